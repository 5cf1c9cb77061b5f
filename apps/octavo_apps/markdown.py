"""Markdown that was written by a model, or pasted, made harmless before the browser shows it.

Formatting and code stay; HTML becomes text that shows itself, and a picture becomes a link, so that showing an answer
never asks another host for anything. Called by `conversation`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCE = re.compile(r"(?m)^[ ]{0,3}(`{3,}|~{3,})[^\n]*$")
_TICKS = re.compile(r"`+")
_ENTITY = re.compile(r"&(?=[a-zA-Z#])")
_TAG = re.compile(r"<(?=[a-zA-Z/!?])")
_PICTURE = "!["
_HARMLESS = "!\u200b["
"""A blank without width stands between the two."""


def defused(text: str) -> str:
    """`text` with no HTML and no pictures outside of code. A block of code that is not closed (yet) counts as code."""
    return "".join(part if code else _without_html(part) for part, code in _parts(text))


def fused(text: str) -> str:
    """What `defused` was given."""
    return "".join(part if code else _with_html(part) for part, code in _parts(text))


def _without_html(text: str) -> str:
    text = _TAG.sub("&lt;", _ENTITY.sub("&amp;", text))
    return text.replace(_PICTURE, _HARMLESS)


def _with_html(text: str) -> str:
    return text.replace(_HARMLESS, _PICTURE).replace("&lt;", "<").replace("&amp;", "&")


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of `text`, and whether each is code."""
    place = 0
    while (begin := _FENCE.search(text, place)) is not None:
        yield from _inline(text[place : begin.start()])
        mark = begin.group(1)
        closing = re.compile(rf"(?m)^[ ]{{0,3}}{re.escape(mark[0])}{{{len(mark)},}}[ \t]*$")
        end = closing.search(text, begin.end())
        place = len(text) if end is None else end.end()
        yield text[begin.start() : place], True
    yield from _inline(text[place:])


def _inline(text: str) -> Iterator[tuple[str, bool]]:
    """Code between equal numbers of backticks, in one paragraph."""
    place = 0
    while (begin := _TICKS.search(text, place)) is not None:
        paragraph = text.find("\n\n", begin.end())
        last = len(text) if paragraph < 0 else paragraph
        ends = (tick for tick in _TICKS.finditer(text, begin.end(), last) if len(tick.group()) == len(begin.group()))
        end = next(ends, None)
        yield text[place : begin.start()], False
        if end is None:
            yield begin.group(), False
            place = begin.end()
        else:
            yield text[begin.start() : end.end()], True
            place = end.end()
    yield text[place:], False
