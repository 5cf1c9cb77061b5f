"""Prompts, bounded before they are read: what is surely too long for the model is refused by its size alone, and what
takes long to tokenise is tokenised in a thread. Called by every endpoint that makes text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from octavo.async_llm import AsyncLLM
from octavo.errors import RequestError
from octavo.server.errors import refused
from octavo.tokenizer import Tokenizer

APART = 4096
"""Characters that are tokenised on the event loop: a millisecond. More goes to a thread."""

T = TypeVar("T")


class TextBound:
    """How long a text may be that a model could hold: the bytes of its longest token for each place."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        longest = max((len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)), default=1)
        self._max_model_len = max_model_len
        self.bytes = max(longest, 1) * max_model_len

    def check(self, text: str, field: str) -> None:
        """Raises `ApiError` for a text that is longer in any tokenisation."""
        self.check_size(len(text) if text.isascii() else len(text.encode("utf-8", "replace")), field)

    def check_size(self, size: int, field: str) -> None:
        """The same for a number of characters or bytes."""
        if size > self.bytes:
            raise refused(f"the text is too long: the model holds {self._max_model_len} tokens", field)


async def off_loop(size: int, function: Callable[[], T]) -> T:
    """`function()`, in a thread if it works through `size` characters that are many."""
    return function() if size <= APART else await asyncio.to_thread(function)


def truncated(ids: Sequence[int], keep: int | None, llm: AsyncLLM) -> list[int]:
    """vLLM's `truncate_prompt_tokens`: the last `keep` tokens; -1: as many as the model holds."""
    if keep is None:
        return list(ids)
    room = llm.engine.limits.max_model_len - 1
    if keep == -1:
        keep = room
    if not 1 <= keep <= room:
        message = f"truncate_prompt_tokens must be -1, or from 1 to {room}, not {keep}"
        raise RequestError(message, "truncate_prompt_tokens")
    return list(ids[-keep:])


def salted(prompt: Any, salt: str) -> dict[str, Any]:
    """A prompt with the salt of its prefix cache."""
    if isinstance(prompt, dict):
        return {**prompt, "cache_salt": salt}
    return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, "cache_salt": salt}


def salt_of(key_salt: str, cache_salt: str | None) -> str:
    """Of the key that asks, and of what the request says."""
    return f"{key_salt}/{cache_salt}" if cache_salt is not None else key_salt
