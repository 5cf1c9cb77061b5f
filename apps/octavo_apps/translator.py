"""What the translation app asks of a model: `Translator`, and the one that asks a chat model by a prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from octavo.async_llm import AsyncLLM
from octavo.sampling_params import SamplingParams

from octavo_apps.languages import ALL, Language

TOKENS_PER_TOKEN = 3
"""An answer may have so many times the tokens of its sentence: some languages need more for the same."""
LEAST_TOKENS = 48


class Translator(Protocol):
    """Translates sentences on an engine."""

    def languages(self) -> Sequence[Language]:
        """Those that it translates from and to."""

    def stream(self, sentence: str, source: Language, target: Language) -> AsyncGenerator[str]:
        """Pieces of the translation. Closing the generator ends the request. Raises `OctavoError`."""

    async def alternatives(self, sentence: str, source: Language, target: Language, count: int) -> list[str]:
        """Up to `count` other translations, the best first, none twice. Raises `OctavoError`."""


class ChatTranslator:
    """By a prompt to a chat model."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    def languages(self) -> Sequence[Language]:
        return ALL

    async def stream(self, sentence: str, source: Language, target: Language) -> AsyncGenerator[str]:
        prompt = self._prompt(sentence, source, target)
        started = False
        stream = await self._llm.begin(prompt, self._params(sentence, SamplingParams(temperature=0)))
        async with aclosing(stream):
            async for piece in stream:
                text = piece.text if started else piece.text.lstrip()
                started = started or bool(text)
                if text:
                    yield text

    async def alternatives(self, sentence: str, source: Language, target: Language, count: int) -> list[str]:
        prompt = self._prompt(sentence, source, target)
        params = self._params(sentence, SamplingParams(temperature=0.9, top_p=0.9, n=count))
        (output,) = await self._llm.generate([prompt], params)
        return list(dict.fromkeys(filter(None, (one.text.strip() for one in output.outputs))))

    def _prompt(self, sentence: str, source: Language, target: Language) -> dict[str, object]:
        asked = (
            f"Translate this sentence from {source.name} to {target.name}. Write the translation only.\n\n{sentence}"
        )
        messages = [
            {"role": "system", "content": f"You translate from {source.name} to {target.name}."},
            {"role": "user", "content": asked},
        ]
        prompt = self._llm.chat_prompt(messages, {})["prompt"]
        return {"prompt_token_ids": self._llm.tokenizer.encode(prompt, add_special_tokens=False)}

    def _params(self, sentence: str, params: SamplingParams) -> SamplingParams:
        tokens = len(self._llm.tokenizer.encode(sentence, add_special_tokens=False))
        return replace(params, max_tokens=LEAST_TOKENS + TOKENS_PER_TOKEN * tokens, stop=["\n\n"])
