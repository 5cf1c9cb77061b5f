"""What the translation app asks of a model: `Translator`, and who answers it. `translator_of` chooses: a model that was
made to translate is asked by `AsyncLLM.translate`, one that chats by a prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from octavo.async_llm import AsyncLLM
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

from octavo_apps.languages import Language

TOKENS_PER_TOKEN = 3
"""An answer may have so many times the tokens of its sentence: some languages need more for the same."""
LEAST_TOKENS = 48


class Translator(Protocol):
    """Translates sentences on an engine."""

    def stream(self, sentence: str, source: Language, target: Language) -> AsyncGenerator[str]:
        """Pieces of the translation. Closing the generator ends the request. Raises `OctavoError`."""

    async def alternatives(self, sentence: str, source: Language, target: Language, count: int) -> list[str]:
        """Up to `count` translations that a beam search finds, the best first, none twice. Raises `OctavoError`."""


def translator_of(llm: AsyncLLM) -> Translator:
    return ChatTranslator(llm) if llm.engine.scheme is None else ModelTranslator(llm)


class ModelTranslator:
    """By a translation model."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def stream(self, sentence: str, source: Language, target: Language) -> AsyncGenerator[str]:
        pieces = self._llm.translate_stream(
            sentence, source=source.code, target=target.code, sampling_params=self._params(sentence)
        )
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def alternatives(self, sentence: str, source: Language, target: Language, count: int) -> list[str]:
        params = self._params(sentence, use_beam_search=True, beam_width=count, n=count)
        (output,) = await self._llm.translate(
            [sentence], source=source.code, target=target.code, sampling_params=params
        )
        return _different(output.sentences[:1])

    def _params(self, sentence: str, **search: Any) -> SamplingParams:
        tokens = len(self._llm.tokenizer.encode(sentence, add_special_tokens=False))
        return SamplingParams(temperature=0, max_tokens=LEAST_TOKENS + TOKENS_PER_TOKEN * tokens, **search)


class ChatTranslator:
    """By a prompt to a chat model."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def stream(self, sentence: str, source: Language, target: Language) -> AsyncGenerator[str]:
        prompt = self._prompt(sentence, source, target)
        started = False
        params = SamplingParams(temperature=0, max_tokens=self._most(sentence), stop=["\n\n"])
        stream = await self._llm.begin(prompt, params)
        async with aclosing(stream):
            async for piece in stream:
                text = piece.text if started else piece.text.lstrip()
                started = started or bool(text)
                if text:
                    yield text

    async def alternatives(self, sentence: str, source: Language, target: Language, count: int) -> list[str]:
        prompt = self._prompt(sentence, source, target)
        params = SamplingParams(
            use_beam_search=True, beam_width=count, n=count, temperature=0, max_tokens=self._most(sentence),
            length_penalty=0.0,  # or the longest would win: translations with remarks about them
        )  # fmt: skip
        return _different(await self._llm.generate([prompt], params))

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

    def _most(self, sentence: str) -> int:
        """Tokens that a translation may have."""
        tokens = len(self._llm.tokenizer.encode(sentence, add_special_tokens=False))
        return LEAST_TOKENS + TOKENS_PER_TOKEN * tokens


def _different(outputs: Sequence[RequestOutput]) -> list[str]:
    """The texts of all outputs without what came after a blank line, none twice."""
    found = (" ".join(one.text.strip().partition("\n\n")[0].split()) for output in outputs for one in output.outputs)
    return list(dict.fromkeys(filter(None, found)))
