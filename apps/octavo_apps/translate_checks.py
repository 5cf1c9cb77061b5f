"""What is checked before a translation begins, with the sentences that say what is wrong. Called by both tabs of the
translation page."""

from __future__ import annotations

import asyncio

from octavo.errors import RequestError

from octavo_apps.languages import Language, detect
from octavo_apps.look import notice
from octavo_apps.translator import Translator

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


async def languages_of(text: str, source: str, target: str, translator: Translator) -> tuple[Language, Language]:
    """Source and target. Raises `RequestError` for languages that the model lacks."""
    known = {language.code: language for language in translator.languages()}
    code = source
    if source == OPEN:
        found = await asyncio.to_thread(detect, text, known)
        if found is None:
            raise RequestError("This text has no letters: there is nothing to translate.")
        code = found
        if code not in known:
            raise RequestError(
                f"This text seems to be in a language that the model lacks ({code}): if it is not, choose its language."
            )
    for one in (code, target):
        if one not in known:
            raise RequestError(f"The model lacks the language {one!r}: choose another.")
    if code == target:
        raise RequestError(f"The text is in {known[code].name} already: choose another language to translate to.")
    return known[code], known[target]


def loading(model: str) -> str:
    return notice(f"{model} is being loaded. A new model is fetched first.", wrong=False)
