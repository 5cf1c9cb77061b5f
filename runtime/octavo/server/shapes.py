"""Parts of answers that several endpoints share: usage, log-probabilities, ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from octavo.outputs import RequestMetrics, TokenLogprobs
from octavo.tokenizer import Tokenizer

LEAST = -9999.0
"""In place of minus infinity, which JSON does not have."""


def usage(metrics: Sequence[RequestMetrics]) -> dict[str, Any]:
    """Tokens of a call, with those of the prompts that the prefix cache had."""
    prompt, made = sum(one.prompt_tokens for one in metrics), sum(one.output_tokens for one in metrics)
    return {
        "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in metrics)},
    }  # fmt: skip


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


def token_name(tokenizer: Tokenizer, token: int, as_id: bool) -> str:
    """A token's text; `as_id`: vLLM's way of telling apart those whose texts are alike."""
    return f"token_id:{token}" if as_id else tokenizer.token_text(token)


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], given: Sequence[TokenLogprobs], top: int, as_id: bool
) -> list[dict[str, Any]]:
    """Of the chat API, an entry for each token. `top`: alternatives in each, best first."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_bytes(token)
        return {"token": token_name(tokenizer, token, as_id), "logprob": finite(logprob), "bytes": list(text)}

    return [
        {
            **entry(token, ranked[token].logprob),
            "top_logprobs": [entry(other, one.logprob) for other, one in list(ranked.items())[:top]],
        }
        for token, ranked in zip(tokens, given, strict=False)
    ]


def prompt_logprobs(given: Sequence[TokenLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's field of this name: by token id, for each token of the prompt."""
    if given is None:
        return None
    return [
        None if ranked is None else {
            str(token): {"logprob": finite(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in ranked.items()
        }
        for ranked in given
    ]  # fmt: skip
