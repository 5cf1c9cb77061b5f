"""Who translates for the app: a translation model by `translate`, a chat model by a prompt. Real, tiny models."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from octavo import AsyncLLM, RequestError
from octavo_apps.languages import ALL, BY_CODE
from octavo_apps.translate_checks import OPEN, languages_of
from octavo_apps.translator import ChatTranslator, ModelTranslator, translator_of
from tiny_translators import m2m100

TEXT = "The quick brown fox jumps over the lazy dog."


async def test_a_translation_model_is_asked_to_translate(tmp_path: Path) -> None:
    m2m100(tmp_path)
    english, german = BY_CODE["en"], BY_CODE["de"]
    async with await AsyncLLM.create(str(tmp_path), dtype="float32", num_blocks=200) as llm:
        translator = translator_of(llm)
        assert isinstance(translator, ModelTranslator)
        assert {language.name for language in {*ALL} - {*translator.languages()}} == {"Basque", "Telugu"}
        made = "".join([piece async for piece in translator.stream(TEXT, english, german)])
        (alone,) = await llm.translate([TEXT], source="en", target="de", max_tokens=200)
        assert made
        assert alone.text.startswith(made)
        (searched,) = await llm.translate([TEXT], source="en", target="de", max_tokens=60, beam_width=4)
        found = await translator.alternatives(TEXT, english, german, 4)
        assert len(found) == len(set(found)) > 1
        assert " ".join(searched.text.split())[:20] == found[0][:20]
        assert await languages_of(TEXT, OPEN, "fr", translator) == (english, BY_CODE["fr"])
        with pytest.raises(RequestError, match="lacks"):
            await languages_of(TEXT, "en", "eu", translator)
        assert llm.stats().blocks_used == 0


async def test_a_translation_that_is_given_up_leaves_the_engine(tmp_path: Path) -> None:
    m2m100(tmp_path)
    async with await AsyncLLM.create(str(tmp_path), dtype="float32", num_blocks=200) as llm:
        stream = ModelTranslator(llm).stream(f"{TEXT} " * 12, BY_CODE["en"], BY_CODE["de"])
        async with aclosing(stream):
            first = asyncio.ensure_future(anext(stream))
            while not (begun := llm.stats()).running:
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert first.cancelled()
        for _ in range(100):
            now = llm.stats()
            if now.running == now.waiting == now.blocks_used == 0:
                assert now.steps <= begun.steps + 10
                return
            await asyncio.sleep(0.05)
        raise AssertionError(llm.stats())


async def test_a_chat_model_is_asked_by_a_prompt() -> None:
    async with await AsyncLLM.create() as llm:
        translator = translator_of(llm)
        assert isinstance(translator, ChatTranslator)
        assert translator.languages() == ALL
