"""Word documents, by python-docx: paragraphs, tables, text boxes, headers, footers and notes. Only the characters of
texts change: styles, pictures, tabs, fields and links stay. A sentence takes the style that most of it had."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import docx
from docx.opc.exceptions import OpcError
from docx.opc.part import Part
from docx.oxml import parse_xml
from docx.oxml.ns import qn
from lxml import etree

from octavo_apps.documents import DocumentError
from octavo_apps.translation import Translation

_TEXT, _PARAGRAPH = qn("w:t"), qn("w:p")
_BETWEEN = frozenset(
    map(qn, (
        "w:tab", "w:br", "w:cr", "w:drawing", "w:pict", "w:object", "w:fldChar", "w:instrText", "w:footnoteReference",
        "w:endnoteReference", "w:sym", "w:hyperlink", "w:noBreakHyphen", "m:oMath",
    )),
)  # fmt: skip
"""What a text does not reach across."""
LARGEST_INSIDE = 200_000_000
"""Bytes of all files in the document, unpacked."""


class _Stretch:
    """Texts that read on without a break: elements, and what each held."""

    def __init__(self, elements: Sequence[Any]) -> None:
        self.elements = [(element, element.text or "") for element in elements]
        self.text = "".join(text for _, text in self.elements)
        self.speaks = any(map(str.isalpha, self.text))

    def shared_out(self, translation: Translation) -> Iterator[tuple[Any, str]]:
        """Each sentence to the element that most of it stood in, with the blanks before it."""
        owners = [element for element, text in self.elements for _ in text]
        place = 0
        for one in translation.sentences:
            place += len(one.gap)
            own = owners[place : place + len(one.source)]
            most = max(dict.fromkeys(own), key=own.count)
            yield most, one.gap + one.text
            place += len(one.source)
        yield owners[-1], translation.tail


class WordDocument:
    """A .docx file."""

    def __init__(self, name: str, data: bytes) -> None:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if sum(file.file_size for file in archive.infolist()) > LARGEST_INSIDE:
                    raise DocumentError(f"{name} is too large when it is unpacked: translate it in parts")
            self._document = docx.Document(io.BytesIO(data))
            self._notes = list(self._notes_of())
        except (OpcError, zipfile.BadZipFile, KeyError, ValueError, etree.XMLSyntaxError, AttributeError) as error:
            if isinstance(error, DocumentError):
                raise
            raise DocumentError(f"{name} is broken, or no Word document: {error}") from error
        self._stretches = [stretch for root in self._roots() for stretch in _stretches_of(root) if stretch.speaks]
        self.texts = [stretch.text for stretch in self._stretches]

    def rebuilt(self, texts: Sequence[Translation]) -> bytes:
        for stretch, translation in zip(self._stretches, texts, strict=True):
            new = dict.fromkeys((element for element, _ in stretch.elements), "")
            for element, text in stretch.shared_out(translation):
                new[element] += text
            for element, text in new.items():
                element.text = text
                element.set("{http://www.w3.org/XML/1998/namespace}space", "preserve")
        for part, root in self._notes:
            part._blob = etree.tostring(root, xml_declaration=True, encoding="UTF-8", standalone=True)
        file = io.BytesIO()
        self._document.save(file)
        return file.getvalue()

    def _roots(self) -> Iterator[Any]:
        yield self._document.element.body
        seen = set()
        for section in self._document.sections:
            for part in (
                section.header, section.footer, section.first_page_header, section.first_page_footer,
                section.even_page_header, section.even_page_footer,
            ):  # fmt: skip
                if not part.is_linked_to_previous and part._element not in seen:
                    seen.add(part._element)
                    yield part._element
        for _, root in self._notes:
            yield root

    def _notes_of(self) -> Iterator[tuple[Part, Any]]:
        for relation in self._document.part.rels.values():
            if not relation.is_external and relation.reltype.endswith(("/footnotes", "/endnotes")):
                yield relation.target_part, parse_xml(relation.target_part.blob)


def _stretches_of(root: Any) -> Iterator[_Stretch]:
    for paragraph in root.iter(_PARAGRAPH):
        yield from map(_Stretch, _stretches(paragraph))


def _stretches(paragraph: Any) -> Iterator[list[Any]]:
    """Texts of a paragraph that read on without a break. Paragraphs inside it (of text boxes) have their own."""
    texts: list[Any] = []
    for element in paragraph.iter():
        if element.tag in _BETWEEN and texts:
            yield texts
            texts = []
        if element.tag == _TEXT and next(element.iterancestors(_PARAGRAPH)) is paragraph:
            if texts and _link(texts[-1]) is not _link(element):
                yield texts
                texts = []
            texts.append(element)
    if texts:
        yield texts


def _link(element: Any) -> Any:
    return next(element.iterancestors(qn("w:hyperlink")), None)
