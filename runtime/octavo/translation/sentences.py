"""Texts as sentences and what stands between them, so that they can be put together again with not a blank lost. The
cutting itself is done by sentencex, the segmenter of Wikimedia, with rules for 200 and more languages. Called by
`job.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sentence:
    """`text` has no blank at either end; `before` and `after` are what stood there. A text without any sentence is one
    with an empty `text`."""

    before: str
    text: str
    after: str

    @property
    def whole(self) -> str:
        return self.before + self.text + self.after


def cut(text: str, language: str) -> list[Sentence]:
    """`text` as sentences: joined, their `whole`s are the text. `language`: ISO 639-1 where there is one; rules of a
    related language, or English, serve those that have none. Lines are never joined."""
    from sentencex import segment

    found = []
    for line in text.splitlines(keepends=True):
        pieces = list(segment(language, line)) if line.strip() else [line]
        if "".join(pieces) != line:  # the library promises this and may err
            pieces = [line]
        found += [_stripped(piece) for piece in pieces]
    return found


def shortened(sentence: Sentence, fits: Callable[[str], bool]) -> Iterator[Sentence]:
    """A sentence in pieces that fit, cut at blanks, or anywhere where there are none."""
    rest = sentence.before + sentence.text
    while rest and not fits(rest.strip()):
        low, high = 1, len(rest) - 1  # the longest beginning that fits; one character always goes
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(rest[:middle].strip()) else (low, middle - 1)
        blank = max(rest.rfind(mark, 0, low + 1) for mark in (" ", "\t", "\u3000"))
        end = blank if blank > 0 and rest[:blank].strip() else low
        yield _stripped(rest[:end])
        rest = rest[end:]
    last = _stripped(rest)
    yield Sentence(last.before, last.text, last.after + sentence.after)


def _stripped(piece: str) -> Sentence:
    text = piece.strip()
    if not text:
        return Sentence(piece, "", "")
    begin = piece.index(text)
    return Sentence(piece[:begin], text, piece[begin + len(text) :])
