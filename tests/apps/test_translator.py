"""Who translates for the app: a translation model by `translate`, a chat model by a prompt. Real, tiny models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from octavo import AsyncLLM, RequestError
from octavo_apps.engines import Engines
from octavo_apps.languages import language, large
from octavo_apps.offers import ANY, Offer, Offers
from octavo_apps.translate_checks import OPEN, languages_of
from octavo_apps.translator import ChatTranslator, ModelTranslator, translator_of
from tiny_translators import m2m100, marian, nllb, t5

TEXT = "The quick brown fox jumps over the lazy dog."


async def test_a_translation_model_is_asked_to_translate(tmp_path: Path) -> None:
    m2m100(tmp_path)
    english, german = language("en"), language("de")
    async with await AsyncLLM.create(str(tmp_path), dtype="float32", num_blocks=200) as llm:
        translator = translator_of(llm)
        assert isinstance(translator, ModelTranslator)
        made = "".join([piece async for piece in translator.stream(TEXT, english, german)])
        (alone,) = await llm.translate([TEXT], source="en", target="de", max_tokens=200)
        assert made
        assert alone.text.startswith(made)
        (searched,) = await llm.translate([TEXT], source="en", target="de", max_tokens=60, beam_width=4)
        found = await translator.alternatives(TEXT, english, german, 4)
        assert len(found) == len(set(found)) > 1
        assert " ".join(searched.text.split())[:20] == found[0][:20]
        assert llm.stats().blocks_used == 0


async def test_a_translation_that_is_given_up_leaves_the_engine(tmp_path: Path) -> None:
    m2m100(tmp_path)
    async with await AsyncLLM.create(str(tmp_path), dtype="float32", num_blocks=200) as llm:
        stream = ModelTranslator(llm).stream(f"{TEXT} " * 12, language("en"), language("de"))
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


async def test_languages_are_checked_before_a_translation() -> None:
    offer = Offer([language("en"), language("fr")], [language("de"), language("en")])
    assert await languages_of(TEXT, OPEN, "de", offer) == (language("en"), language("de"))
    assert await languages_of("Hello", "en", "de", offer) == (language("en"), language("de"))
    for text, source, target, says in (
        (TEXT, "en", "eu", "does not translate to Basque"), (TEXT, "eu", "en", "does not translate from Basque"),
        (TEXT, OPEN, "en", "in English already"), ("Das ist gut, und das bleibt so.", OPEN, "en", "German, a language"),
        ("table", OPEN, "de", r"not sure which language this text is in \((French|English) or (French|English)\?\)"),
        ("1 + 1", OPEN, "de", "no letters"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=says):
            await languages_of(text, source, target, offer)


@pytest.mark.parametrize(
    ("make", "sources", "targets", "settled"),
    [
        (nllb, 202, 202, ("", "de")), (m2m100, 100, 100, ("", "de")), (marian, 1, 1, ("en", "de")),
        (lambda folder: marian(folder, (">>fra<<", ">>spa<<")), 60, 2, ("", "fr")), (t5, 60, 60, ("", "de")),
    ],
)  # fmt: skip
def test_the_languages_of_a_model_are_offered_before_it_is_loaded(
    tmp_path: Path, make: Callable[[Path], object], sources: int, targets: int, settled: tuple[str, str]
) -> None:
    make(tmp_path)
    engines = Engines(str(tmp_path))
    offers = Offers(engines)
    offer = offers.of(str(tmp_path))
    assert not engines.is_loaded(str(tmp_path))
    assert offers.known(str(tmp_path))
    assert (len(offer.sources), len(offer.targets)) == (sources, targets)
    assert list(offer.sources) == sorted(offer.sources)
    assert offer.settled("", "de") == settled
    assert offer.settled("xx", "yy")[1] in [one.code for one in offer.targets]
    assert Offers(engines).of("nobody/has-it") is ANY
    assert ANY.targets == large()
