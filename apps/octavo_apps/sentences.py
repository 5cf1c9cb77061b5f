"""Where sentences begin and end, for texts that are translated one sentence at a time. Called by `translation` and the
kinds of document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "fig", "no", "vol", "jr", "sr", "inc", "ltd",
    "co", "approx", "dept", "est", "z.b", "d.h", "bzw", "usw", "ca", "nr", "bspw", "u.a", "mme", "mlle", "p.ex", "env",
    "sra", "dra", "ud", "uds", "pág", "núm", "sig", "dott", "avv", "ecc", "dhr", "mevr", "bijv", "o.a", "t.a.v",
))  # fmt: skip
_END = re.compile(r"""[.!?…]+["'”’»)\]]*(?=\s|$)|[。！？]+[」』”’]*|\n+""")
LONGEST = 600
"""Characters of a sentence; a longer one is cut at a comma or a blank, because models lose their way in it."""


@dataclass(frozen=True, slots=True)
class Span:
    """A sentence at `begin`:`end` of a text, without the blanks around it."""

    begin: int
    end: int


def sentences(text: str) -> list[Span]:
    """Its sentences in order. Blanks and line ends between them belong to none."""
    return [span for begin, end in _pieces(text) for span in _bounded(text, begin, end)]


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    begin = 0
    for end in _END.finditer(text):
        if text[end.start()] in ".…" and _goes_on(text, begin, end):
            continue
        yield begin, end.end()
        begin = end.end()
    yield begin, len(text)


def _goes_on(text: str, begin: int, end: re.Match[str]) -> bool:
    """The full stop ends no sentence: of an abbreviation, an initial, a number of a list; or a small letter follows."""
    if len(end.group()) > 1 and end.group().strip("."):
        return False
    word = text[begin : end.start()].rsplit(None, 1)[-1:] or [""]
    last = word[0].lstrip("(\"'«„“").lower()
    following = text[end.end() :].lstrip(" \t")[:1]
    return last in _ABBREVIATIONS or (len(last) == 1 and last.isalpha()) or last.isdigit() or following.islower()


def _bounded(text: str, begin: int, end: int) -> Iterator[Span]:
    while True:
        piece = text[begin:end]
        begin += len(piece) - len(piece.lstrip())
        end = begin + len(piece.strip())
        if end <= begin:
            return
        if end - begin <= LONGEST:
            yield Span(begin, end)
            return
        window = text[begin : begin + LONGEST]
        places = [window.rfind(mark) + 1 for mark in (";", ",", "、", ",", " ")]
        cut = next((place for place in places if place > LONGEST // 3), LONGEST)
        yield from _bounded(text, begin, begin + cut)
        begin += cut
