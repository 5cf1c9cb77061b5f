"""Subtitles (SubRip): numbers and timings are never touched, nor are tags. Reads and writes by the library `srt`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

import srt

from octavo_apps.documents import DocumentError
from octavo_apps.documents.encoding import TextFile
from octavo_apps.documents.parts import Parts, dealt
from octavo_apps.translation import Translation

_TAGS = re.compile(r"</?[a-zA-Z][^>\n]*>|\{\\[^}\n]*\}|^[-–—]\s*|♪")


class SubtitleDocument:
    """An .srt file."""

    def __init__(self, name: str, data: bytes) -> None:
        self._file = TextFile.read(name, data)
        try:
            self._subtitles = list(srt.parse(self._file.text))
        except (srt.SRTParseError, ValueError) as error:
            raise DocumentError(f"{name} is no file of subtitles: {error}") from error
        if not self._subtitles:
            raise DocumentError(f"{name} has no subtitle in it")
        self._contents = [list(_utterances(subtitle.content)) for subtitle in self._subtitles]
        self._parts = [Parts.split(text, _TAGS) for content in self._contents for text, _ in content]
        self.texts = [text for parts in self._parts for text in parts.texts]

    def rebuilt(self, texts: Sequence[Translation]) -> bytes:
        shares = dealt([one.text for one in texts], self._parts)
        joined = iter([parts.joined(share) for parts, share in zip(self._parts, shares, strict=True)])
        subtitles = []
        for subtitle, content in zip(self._subtitles, self._contents, strict=True):
            lines = [_balanced(next(joined), count) for _, count in content]
            times = subtitle.index, subtitle.start, subtitle.end
            subtitles.append(srt.Subtitle(*times, "\n".join(lines), subtitle.proprietary))
        return self._file.bytes_of(srt.compose(subtitles, reindex=False, strict=False))


def _utterances(content: str) -> Iterator[tuple[str, int]]:
    """What one speaker says, as one text, and on how many lines it stood. A dash at the beginning of a line means
    another speaker."""
    lines: list[str] = []
    for line in content.split("\n"):
        if lines and re.match(r"\s*(<[^>]*>)*[-–—♪]", line):
            yield " ".join(lines), len(lines)
            lines = []
        lines.append(line.strip())
    yield " ".join(lines), len(lines)


def _balanced(text: str, lines: int) -> str:
    """On so many lines of like length."""
    if lines == 1:
        return text
    for width in range(max(len(text) // lines, 1), len(text) + 1):
        wrapped = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        if len(wrapped) <= lines:
            return "\n".join(wrapped)
    return text
