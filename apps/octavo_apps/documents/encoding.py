"""Bytes of a text file to text and back: its encoding and line ends stay what they were, where they can."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from octavo_apps.documents import DocumentError


@dataclass(frozen=True)
class TextFile:
    """The text with `\\n` at the end of each line, and what the file had."""

    text: str
    encoding: str
    line_end: str

    @classmethod
    def read(cls, name: str, data: bytes) -> TextFile:
        """UTF-8, UTF-16 with its mark, or else Windows-1252. Raises `DocumentError` for what is no text."""
        if data.startswith(codecs.BOM_UTF8):
            encoding = "utf-8-sig"
        elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        else:
            encoding = "utf-8"
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            if encoding != "utf-8" or b"\0" in data:
                raise DocumentError(f"{name} is broken: {error}") from error
            text, encoding = data.decode("cp1252", errors="replace"), "utf-8"
        if "\0" in text:
            raise DocumentError(f"{name} is not a text file: it has zero bytes in it")
        line_end = "\r\n" if "\r\n" in text else "\n"
        return cls(text.replace("\r\n", "\n"), encoding, line_end)

    def bytes_of(self, text: str) -> bytes:
        return text.replace("\n", self.line_end).encode(self.encoding)
