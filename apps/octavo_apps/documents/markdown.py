"""Markdown: only prose is handed out. Code, HTML, links' addresses, tables' lines and marks of lists and headings stay
where they are. markdown-it-py says where prose stands; what is put in its place goes into the source as it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

from octavo_apps.documents.encoding import TextFile
from octavo_apps.documents.parts import Parts, dealt
from octavo_apps.translation import Translation

_KEPT = re.compile(
    r"(?P<ticks>`+)(?:(?!`).|(?<!`)`+(?!`))*?(?<!`)(?P=ticks)(?!`)"  # code
    r"|!\[[^\]\n]*\](?:\([^)\n]*\)|\[[^\]\n]*\])?"  # pictures
    r"|\]\((?:[^()\n]|\([^()\n]*\))*\)|\]\[[^\]\n]*\]|[\[\]]"  # links, around their texts
    r"|<[^>\n]+>|https?://[^\s<>)\]]+|\{[^}\n]*\}|\\[^\w\s]|&\w+;|\$[^$\n]+\$"
    r"|[*~]+|(?<!\w)_+|_+(?!\w)"
)
_FRONT = re.compile(r"\A---\n.*?\n(?:---|\.\.\.)\n", re.DOTALL)


@dataclass
class _Place:
    """A paragraph, heading or cell: the lines of the source that it stands on, from `begin` in the first to `end` in
    the last."""

    first: int
    last: int
    begin: int
    end: int
    parts: Parts


class MarkdownDocument:
    """A .md file."""

    def __init__(self, name: str, data: bytes) -> None:
        self._file = TextFile.read(name, data)
        front = _FRONT.match(self._file.text)
        self._front = front.group() if front else ""
        self._lines = self._file.text[len(self._front) :].split("\n")
        self._places = list(self._find())
        self.texts = [text for place in self._places for text in place.parts.texts]

    def rebuilt(self, texts: Sequence[Translation]) -> bytes:
        lines: list[str | None] = list(self._lines)
        shares = list(dealt([one.text for one in texts], [place.parts for place in self._places]))
        for place, share in reversed(list(zip(self._places, shares, strict=True))):  # cells of a row: the last first
            first, last = lines[place.first], lines[place.last]
            assert first is not None
            assert last is not None
            text = place.parts.joined(share)
            lines[place.first] = first[: place.begin] + text + last[place.end :]
            for line in range(place.first + 1, place.last + 1):
                lines[line] = None
        return self._file.bytes_of(self._front + "\n".join(line for line in lines if line is not None))

    def _find(self) -> Iterator[_Place]:
        cells: dict[int, int] = {}  # by line: how far it was read
        for token in MarkdownIt("commonmark").enable("table").parse("\n".join(self._lines)):
            if token.type == "inline" and token.map is not None and token.content.strip():
                yield from self._places_of(token, token.map[0], token.map[1], cells)

    def _places_of(self, token: Token, first: int, end: int, cells: dict[int, int]) -> Iterator[_Place]:
        """One place for each run of lines without a hard break in it."""
        found: list[tuple[int, int, int]] = []  # line, begin, end
        line = first
        for content in token.content.split("\n"):
            core = content.strip()
            while line < end and (begin := self._lines[line].find(core, cells.get(line, 0))) < 0:
                line += 1
            if line >= end:
                return  # written in another way than it reads, such as a cell with an escaped bar: it stays
            cells[line] = begin + len(core)
            found.append((line, begin, begin + len(core)))
            breaks = content.endswith(("  ", "\\"))
            if breaks:
                yield self._place(found)
                found = []
            line = line if line + 1 >= end else line + 1
        if found:
            yield self._place(found)

    def _place(self, found: Sequence[tuple[int, int, int]]) -> _Place:
        text = " ".join(self._lines[line][begin:end] for line, begin, end in found)
        return _Place(found[0][0], found[-1][0], found[0][1], found[-1][2], Parts.split(text, _KEPT))
