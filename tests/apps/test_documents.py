"""Files are taken apart and put together again: with their own texts they are what they were, with others only the
texts differ."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable

import docx
import pytest
import srt
from docx.oxml import OxmlElement
from docx.oxml.ns import qn
from docx.shared import Pt
from hypothesis import given
from hypothesis import strategies as st
from octavo_apps.documents import DocumentError, open_document, translated_name
from octavo_apps.translation import Translation

Change = Callable[[str], str]


def rebuilt(name: str, data: bytes, change: Change = str) -> bytes:
    """The change is made to each sentence."""
    document = open_document(name, data)
    texts = [Translation.of(text, "en", "de") for text in document.texts]
    for text in texts:
        for sentence in text.sentences:
            sentence.text = change(sentence.source)
    return document.rebuilt(texts)


# -- plain text ------------------------------------------------------------------------------------------------------

LETTER = """Dear Ada,

  * the first point
  * the second, 12 of 13

This paragraph was wrapped by hand at the margin, as letters often are,
so it is one text and not three, and its sentences go on from one line
to the next.

----
12345
"""


def test_lines_of_plain_text_stay_lines_and_wrapped_paragraphs_are_one_text() -> None:
    document = open_document("a.txt", LETTER.encode())
    assert len(document.texts) == 4
    assert document.texts[3].startswith("This paragraph")
    assert document.texts[3].endswith("to the next.")
    assert rebuilt("a.txt", LETTER.encode()) == LETTER.encode()
    upper = rebuilt("a.txt", LETTER.encode(), str.upper).decode()
    assert upper == LETTER.upper()
    longer = rebuilt("a.txt", LETTER.encode(), lambda text: text + " more" * 20).decode()
    assert all(len(line) < 130 for line in longer.split("\n"))
    assert longer.count("\n") > LETTER.count("\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_and_line_ends_stay(encoding: str) -> None:
    data = "Größe\r\n\r\nTürkçe 中文\r\n".encode(encoding)
    assert rebuilt("a.txt", data) == data


def test_an_old_encoding_becomes_utf_8() -> None:
    assert rebuilt("a.txt", "Größe".encode("cp1252")).decode("utf-8") == "Größe"


@given(st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n"), min_size=1))
def test_any_text_with_a_letter_comes_back(text: str) -> None:
    text += "x"
    assert " ".join(rebuilt("a.txt", text.encode()).decode().split()) == " ".join(text.split())


# -- Markdown --------------------------------------------------------------------------------------------------------

PAGE = """---
title: stays as it is
---

# A heading with `code` in it

A paragraph with a [link](https://example.com/a_b "title"), **bold words** and
a second line; see https://example.com/x or <https://example.org>.

- an item
- another
  goes on here

1. numbered
   > quoted
   > in two lines

| Name | What it does |
|------|--------------|
| `run` | starts it |
| stop | ends it |

```python
print("never touched")  # not this either
```

    indented code

![a picture](picture.png) and text.
Hard break  
after it.

<div class="x">html stays</div>

[ref]: https://example.com "stays"
"""


def test_only_the_prose_of_markdown_changes() -> None:
    same = PAGE  # but for lines of one paragraph, which become one
    for wrapped in ("\na second", "\n  goes on", "\n   > in two", "\nHard break"):
        same = same.replace(wrapped, " " + wrapped.strip("\n >"))
    assert rebuilt("a.md", PAGE.encode()).decode() == same
    upper = rebuilt("a.md", PAGE.encode(), str.upper).decode()
    for kept in (
        "title: stays as it is", "`code`", '](https://example.com/a_b "title")', "https://example.com/x",
        "<https://example.org>", "`run`", 'print("never touched")  # not this either', "    indented code",
        "![a picture](picture.png)", '<div class="x">html stays</div>', '[ref]: https://example.com "stays"',
        "|------|--------------|",
    ):  # fmt: skip
        assert kept in upper, kept
    for changed in (
        "# A HEADING WITH", "[LINK]", "**BOLD WORDS**", "- AN ITEM", "- ANOTHER GOES ON HERE", "1. NUMBERED",
        "> QUOTED IN TWO LINES", "| NAME | WHAT IT DOES |", "| STARTS IT |", "| STOP | ENDS IT |",
        "HARD BREAK  \nAFTER IT.",
    ):  # fmt: skip
        assert changed in upper, changed


# -- subtitles -------------------------------------------------------------------------------------------------------

SUBTITLES = """1
00:00:01,000 --> 00:00:02,500
<i>Hello there,</i>

3
00:00:02,900 --> 00:01:04,001 X1:10
{\\an8}This is a subtitle
on two lines.

4
01:02:03,004 --> 01:02:05,006
- Who is it?
- It is me!
"""


def test_timings_numbers_and_tags_of_subtitles_stay() -> None:
    document = open_document("a.srt", SUBTITLES.encode())
    assert document.texts == ["Hello there,", "This is a subtitle on two lines.", "Who is it?", "It is me!"]
    upper = rebuilt("a.srt", SUBTITLES.encode(), lambda text: f"{text} and then some more".upper()).decode()
    stamps = re.compile(r"(?m)^\d+$|^.*-->.*$|</?i>|\{.an8\}")
    assert stamps.findall(upper) == stamps.findall(SUBTITLES)
    first, second, third = srt.parse(upper)
    assert first.content == "<i>HELLO THERE, AND THEN SOME MORE</i>"
    assert second.content.count("\n") == 1
    assert third.content == "- WHO IS IT? AND THEN SOME MORE\n- IT IS ME! AND THEN SOME MORE"
    same = rebuilt("a.srt", SUBTITLES.encode()).decode()
    assert same.split() == SUBTITLES.split()
    assert same.strip().count("\n") == SUBTITLES.strip().count("\n")


# -- Word ------------------------------------------------------------------------------------------------------------


def word_file() -> bytes:
    document = docx.Document()
    document.add_heading("The title", 1)
    paragraph = document.add_paragraph("Most of this sentence is plain, ")
    paragraph.add_run("some").bold = True
    paragraph.add_run(" is not. ")
    styled = paragraph.add_run("This whole sentence is italic.")
    styled.italic, styled.font.size = True, Pt(20)
    tabbed = document.add_paragraph("left")
    tabbed.add_run("\tright\nbelow")
    table = document.add_table(2, 2)
    for number, cell in enumerate(cell for row in table.rows for cell in row.cells):
        cell.text = f"cell {number}"
    table.cell(0, 0).add_table(1, 1).cell(0, 0).text = "inner"
    document.sections[0].header.paragraphs[0].text = "the header"
    document.sections[0].footer.paragraphs[0].text = "the footer"
    linked = document.add_paragraph("see ")
    link = OxmlElement("w:hyperlink")
    link.set(qn("w:anchor"), "place")
    run = linked.add_run("this link")._r
    link.append(run)
    linked._p.append(link)
    linked.add_run(" for more")
    document.add_paragraph("12 345")
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def test_word_keeps_styles_tables_headers_tabs_and_links() -> None:
    data = word_file()
    found = docx.Document(io.BytesIO(rebuilt("a.docx", data, str.upper)))
    before = docx.Document(io.BytesIO(data))
    assert [p.style.name for p in found.paragraphs] == [p.style.name for p in before.paragraphs]
    assert [p.text for p in found.paragraphs] == [p.text.upper() for p in before.paragraphs]
    sentence = found.paragraphs[1].runs
    assert [run.text for run in sentence if run.text] == [
        "MOST OF THIS SENTENCE IS PLAIN, SOME IS NOT.", " THIS WHOLE SENTENCE IS ITALIC."
    ]  # fmt: skip
    assert [run.italic for run in sentence if run.text] == [None, True]
    assert sentence[-1].font.size == Pt(20)
    cells = [cell.text for row in found.tables[0].rows for cell in row.cells]
    assert cells == ["CELL 0\n", "CELL 1", "CELL 2", "CELL 3"]
    assert found.tables[0].cell(0, 0).tables[0].cell(0, 0).text == "INNER"
    assert found.sections[0].header.paragraphs[0].text == "THE HEADER"
    assert found.sections[0].footer.paragraphs[0].text == "THE FOOTER"
    (link,) = found.element.body.iter(qn("w:hyperlink"))
    assert link.get(qn("w:anchor")) == "place"
    assert "".join(text.text for text in link.iter(qn("w:t"))) == "THIS LINK"


def test_word_with_its_own_texts_is_the_same_document() -> None:
    data = word_file()
    before, after = docx.Document(io.BytesIO(data)), docx.Document(io.BytesIO(rebuilt("a.docx", data)))
    assert [p.text for p in before.paragraphs] == [p.text for p in after.paragraphs]
    with zipfile.ZipFile(io.BytesIO(data)) as one, zipfile.ZipFile(io.BytesIO(rebuilt("a.docx", data))) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


# -- bad files -------------------------------------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.pdf", b"%PDF", r"\.docx, \.md, \.srt, \.txt"),
        ("a", b"text", "files of these kinds"),
        ("a.txt", b"", "no text"),
        ("a.txt", b"123\n456", "no text"),
        ("a.txt", b"PK\x03\x04\x00\x00\xff", "broken"),
        ("a.txt", b"abc\x00def", "zero bytes"),
        ("a.srt", b"this is no subtitle", "no file of subtitles|no subtitle"),
        ("a.srt", b"1\n00:00:01 --> bad\nHello\n", "no file of subtitles|no subtitle"),
        ("a.docx", b"not a zip", "no Word document"),
        ("a.docx", cut(word_file()), "no Word document"),
        ("a.docx", b"PK\x05\x06" + bytes(18), "no Word document"),
        ("a.txt", b"a" * 20_000_001, "20 MB"),
    ],
)
def test_bad_files_are_refused_with_a_sentence(name: str, data: bytes, says: str) -> None:
    with pytest.raises(DocumentError, match=says) as caught:
        open_document(name, data)
    assert name in str(caught.value)


def test_the_name_of_a_translated_file() -> None:
    assert translated_name("my.letter.docx", "de") == "my.letter.de.docx"
