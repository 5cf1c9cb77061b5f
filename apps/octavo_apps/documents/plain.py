"""Plain text: lines stay lines. A paragraph that was wrapped by hand is one text, and is wrapped again."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from octavo_apps.documents.encoding import TextFile
from octavo_apps.documents.parts import Parts, dealt
from octavo_apps.translation import Translation

_WRAPPED = range(50, 110)
"""Lengths of lines that look wrapped by hand, all but a paragraph's last."""


@dataclass
class _Paragraph:
    parts: Parts
    width: int | None
    """To wrap it again; None for one line."""

    def joined(self, texts: Sequence[str]) -> str:
        text = self.parts.joined(texts)
        return text if self.width is None else textwrap.fill(text, self.width, break_long_words=False)


class PlainDocument:
    """A .txt file."""

    def __init__(self, name: str, data: bytes) -> None:
        self._file = TextFile.read(name, data)
        self._paragraphs = list(_paragraphs(self._file.text))
        self.texts = [text for paragraph in self._paragraphs for text in paragraph.parts.texts]

    def rebuilt(self, texts: Sequence[Translation]) -> bytes:
        shares = dealt([one.text for one in texts], [paragraph.parts for paragraph in self._paragraphs])
        lines = [paragraph.joined(share) for paragraph, share in zip(self._paragraphs, shares, strict=True)]
        return self._file.bytes_of("\n".join(lines))


def _paragraphs(text: str) -> Iterator[_Paragraph]:
    lines = text.split("\n")
    place = 0
    while place < len(lines):
        end = place
        while end + 1 < len(lines) and _goes_on(lines[end], lines[end + 1]):
            end += 1
        if end > place:
            joined = " ".join(line.strip() for line in lines[place : end + 1])
            yield _Paragraph(Parts.split(joined), max(map(len, lines[place : end + 1])))
        else:
            yield _Paragraph(Parts.split(lines[place]), None)
        place = end + 1


def _goes_on(line: str, following: str) -> bool:
    """The two look like one sentence that was cut at the margin."""
    ends = re.search(r"[.!?:;。]\W*$", line) is not None
    begins = re.match(r"[^\W\d_]", following) is not None
    return len(line) in _WRAPPED and begins and (not ends or following[:1].islower())
