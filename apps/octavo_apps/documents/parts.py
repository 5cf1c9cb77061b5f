"""One piece of text with parts that must not change: a text becomes what is translated and what stays between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass
class Parts:
    """Pieces in order; those at `open` are texts to translate, the others stay."""

    pieces: list[str]
    open: list[int]

    @classmethod
    def split(cls, text: str, kept: re.Pattern[str] | None = None) -> Parts:
        """Keep what `kept` finds, and the blanks around each text."""
        pieces: list[str] = []
        found: list[int] = []
        for piece, stays in _pieces(text, kept):
            core = piece.strip()
            if stays or not any(map(str.isalpha, core)):
                pieces.append(piece)
                continue
            begin = piece.index(core)
            pieces += [piece[:begin], core, piece[begin + len(core) :]]
            found.append(len(pieces) - 2)
        return cls(pieces, found)

    @property
    def texts(self) -> list[str]:
        return [self.pieces[place] for place in self.open]

    def joined(self, texts: Sequence[str]) -> str:
        pieces = list(self.pieces)
        for place, text in zip(self.open, texts, strict=True):
            pieces[place] = text
        return "".join(pieces)


def _pieces(text: str, kept: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
    place = 0
    for match in kept.finditer(text) if kept is not None else ():
        yield text[place : match.start()], False
        yield match.group(), True
        place = match.end()
    yield text[place:], False


def dealt(texts: Sequence[str], parts: Sequence[Parts]) -> Iterator[list[str]]:
    """For each of `parts`, its share of `texts`."""
    place = 0
    for one in parts:
        yield list(texts[place : place + len(one.open)])
        place += len(one.open)
