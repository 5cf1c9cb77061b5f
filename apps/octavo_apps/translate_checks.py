"""What is checked before a translation begins, with the sentences that say what is wrong. Called by both tabs of the
translation page."""

from __future__ import annotations

import asyncio

from octavo.errors import RequestError

from octavo_apps.detection import detect
from octavo_apps.languages import Language, language
from octavo_apps.look import notice
from octavo_apps.offers import Offer

OPEN = ""
"""The choice that leaves the source language open."""
LONGEST_TEXT = 200_000
"""Characters of a text on the page; a file may have more."""


def check_text(text: str) -> None:
    if not text.strip():
        raise RequestError("Write a text first.")
    if len(text) > LONGEST_TEXT:
        raise RequestError(
            f"This text has {len(text):,} characters; the page takes {LONGEST_TEXT:,}: translate it as a file."
        )


async def languages_of(text: str, source: str, target: str, offer: Offer) -> tuple[Language, Language]:
    """Source and target. Raises `RequestError` for languages that the model lacks, and where the source is open and
    not sure."""
    if source == OPEN:
        guess = await asyncio.to_thread(detect, text, offer.sources)
        if guess is None:
            raise RequestError("This text has no letters: there is nothing to translate.")
        if not guess.sure:
            names = " or ".join(one.name for one in (guess.found, *guess.near))
            raise RequestError(f"It is not sure which language this text is in ({names}?): choose it under “From”.")
        if guess.found not in offer.sources:
            raise RequestError(
                f"This text seems to be in {guess.found.name}, a language that the model lacks: if it is not, choose "
                f"its language."
            )
        source = guess.found.code
    for code, side, preposition in ((source, offer.sources, "from"), (target, offer.targets, "to")):
        if language(code) not in side:
            raise RequestError(f"The model does not translate {preposition} {language(code).name}: choose another.")
    if source == target:
        raise RequestError(f"The text is in {language(source).name} already: choose another language to translate to.")
    return language(source), language(target)


def loading(model: str) -> str:
    return notice(f"{model} is being loaded. A new model is fetched first.", wrong=False)
