"""Files that are translated with their layout. Each kind takes a file apart into texts, and puts it together again with
others in their place; what is no text for people (timings, code, links, styles) it never hands out.

`open_document` finds the kind by the file's name. Called by the translation app; `translated_name` names the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Protocol

from octavo.errors import OctavoError

from octavo_apps.translation import Translation


class DocumentError(OctavoError, ValueError):
    """A file is of a kind that is not known, or is broken."""


class Document(Protocol):
    """A file, taken apart."""

    @property
    def texts(self) -> Sequence[str]:
        """What is to be translated, in the file's order; each has a letter in it."""

    def rebuilt(self, texts: Sequence[Translation]) -> bytes:
        """The file with these in place of its texts, one for each. May be called again with others."""


LARGEST = 20_000_000
"""Bytes of a file."""


def open_document(name: str, data: bytes) -> Document:
    """Take a file apart. Raises `DocumentError`."""
    suffix = PurePath(name).suffix.lower()
    kinds = _kinds()
    if suffix not in kinds:
        known = ", ".join(sorted(kinds))
        raise DocumentError(f"{name} cannot be translated: files of these kinds can: {known}")
    if len(data) > LARGEST:
        raise DocumentError(f"{name} is larger than {LARGEST // 1_000_000} MB: translate it in parts")
    document = kinds[suffix](name, data)
    if not document.texts:
        raise DocumentError(f"{name} has no text in it")
    return document


def translated_name(name: str, code: str) -> str:
    """`letter.docx` in German: `letter.de.docx`."""
    path = PurePath(name)
    return f"{path.stem}.{code}{path.suffix}"


def _kinds() -> dict[str, Callable[[str, bytes], Document]]:
    from octavo_apps.documents.markdown import MarkdownDocument
    from octavo_apps.documents.plain import PlainDocument
    from octavo_apps.documents.subtitles import SubtitleDocument
    from octavo_apps.documents.word import WordDocument

    return {".txt": PlainDocument, ".md": MarkdownDocument, ".srt": SubtitleDocument, ".docx": WordDocument}
