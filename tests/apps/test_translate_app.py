"""The translation app, used by a person: a real browser, the real default model. What the model says is not judged: it
is a chat model of 135M parameters, asked by a prompt."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import browser
import docx
import pytest
import srt
import tiny_translators as tiny
from conftest import Fault, nothing_runs, stats
from octavo_apps import serve
from octavo_apps.engines import Engines
from octavo_apps.translate import TranslatePage
from playwright.sync_api import BrowserContext, expect

New = Callable[..., browser.TranslateTab]
FRENCH = "Bonjour à tous. Le chat est sur la table.\n\nIl fait beau aujourd'hui, n'est-ce pas ?"
LONG = " ".join(f"Le train numéro {number} part de la gare à midi et demi." for number in range(300))


@pytest.fixture
def tab(new_translate: New) -> Iterator[browser.TranslateTab]:
    """Nothing may be asked of another host, and no script may fail."""
    tab = new_translate()
    yield tab
    assert len(tab.requests) > 5, "no request was recorded"
    assert tab.outside == []
    assert tab.errors == []


def test_a_text_is_detected_and_translated_sentence_by_sentence(tab: browser.TranslateTab, engines: Engines) -> None:
    sentences = tab.translate(FRENCH)
    assert len(sentences) == 3
    assert all(sentence not in ("", "…") for sentence in sentences)
    expect(tab.result).to_contain_text("French (detected) to German")
    shown = tab.result.locator(".body").inner_text()
    assert "\n\n" in shown, "paragraphs stay"
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.get_by_role("button", name="Copy translation").click()
    assert tab.page.evaluate("navigator.clipboard.readText()").split() == shown.split()
    assert tab.sideways() == 0
    assert stats(engines).largest_batch >= 3, "the sentences were not translated in one batch"
    nothing_runs(engines)


def test_languages_are_searched_and_swapped(tab: browser.TranslateTab) -> None:
    tab.page.get_by_role("button", name="Swap").click()
    expect(tab.notice).to_contain_text("Choose a language to swap with")
    tab.language("To").click()
    expect(tab.page.get_by_role("option", name="German")).to_be_in_viewport()  # the list opens where it stands
    tab.text.click()
    tab.choose("To", "English")
    sentences = tab.translate("Le chat est sur la table.")
    expect(tab.result).to_contain_text("French (detected) to English")
    tab.page.get_by_role("button", name="Swap").click()
    expect(tab.language("From")).to_have_value("English")
    expect(tab.language("To")).to_have_value("French")
    expect(tab.text).to_have_value(sentences[0])
    tab.choose("From", "Swedish")
    expect(tab.language("From")).to_have_value("Swedish")


def test_a_language_is_taken_at_once(tab: browser.TranslateTab) -> None:
    """Enter, and the cursor goes elsewhere before the page has done anything else: on a slow machine it does."""
    tab.language("To").click()
    tab.page.keyboard.type("Engl")
    expect(tab.page.get_by_role("option").first).to_contain_text("English")
    tab.language("To").evaluate(
        """input => {
            for (const key of ["l", "Enter"])
                input.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
            input.blur();
        }"""
    )
    expect(tab.page.get_by_role("option")).to_have_count(0)
    expect(tab.language("To")).to_have_value("English")
    tab.language("To").focus()
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("Enter")
    tab.text.focus()
    expect(tab.language("To")).to_have_value("Estonian")
    tab.language("To").focus()
    tab.page.keyboard.type("English")
    tab.text.focus()
    expect(tab.language("To")).to_have_value("Estonian")  # without Enter nothing is chosen


def test_the_languages_are_those_of_the_model(new_context: Callable[..., BrowserContext], tmp_path: Path) -> None:
    """Of one with 202, of one with 100, and of one with a single pair, without loading them; and they can be used."""
    folders = {make.__name__: tmp_path / make.__name__ for make in (tiny.nllb, tiny.m2m100, tiny.marian)}
    for name, folder in folders.items():
        folder.mkdir()
        getattr(tiny, name)(folder)
    engines = Engines(str(folders["nllb"]), dtype="float32", num_blocks=200)
    page = TranslatePage(engines)
    tab = browser.TranslateTab(new_context().new_page(), serve(page.blocks, block=False))
    options = tab.page.get_by_role("option")
    try:
        tab.open()
        tab.language("To").click()
        expect(options).to_have_count(202)
        tab.page.keyboard.press("Escape")
        tab.choose("From", "Chinese (Traditional)")
        tab.choose("To", "Faroese")
        assert not engines.is_loaded(str(folders["nllb"]))
        tab.page.get_by_role("button", name="Model").last.click()
        for name, count, target in (("m2m100", 100, "English"), ("marian", 1, "German")):
            tab.language("Model").fill(str(folders[name]))
            tab.language("Model").press("Enter")
            expect(tab.language("To")).to_have_value(target)
            tab.language("To").click()
            expect(options).to_have_count(count)
            tab.page.keyboard.press("Escape")
        expect(tab.language("From")).to_have_value("English")
        assert tab.translate("The quick brown fox jumps over the lazy dog.")
        expect(tab.result).to_contain_text("English to German")
        tab.page.get_by_role("button", name="Swap").click()
        expect(tab.notice).to_have_text("This model does not translate from German to English.")
        assert tab.errors == []
    finally:
        page.blocks.close()
        engines.close()


def test_it_streams_and_stop_ends_the_requests_in_the_engine(tab: browser.TranslateTab, engines: Engines) -> None:
    tab.text.fill(LONG)
    tab.go.click()
    expect(tab.stop).to_be_visible(timeout=20_000)
    expect(tab.sentences.first).not_to_have_text("…", timeout=20_000)
    expect(tab.sentences.last).to_have_text("…")
    running = stats(engines).running
    assert 1 < running <= 16, "they do not share a batch"
    tab.stop.click()
    expect(tab.notice).to_have_text("Stopped.")
    nothing_runs(engines)
    assert tab.translate("Bonjour à tous.")


def test_a_new_translation_ends_the_one_that_is_made(tab: browser.TranslateTab, engines: Engines) -> None:
    tab.text.fill(LONG)
    tab.go.click()
    expect(tab.sentences.first).not_to_have_text("…", timeout=20_000)
    tab.page.get_by_role("button", name="New translation").click()
    expect(tab.text).to_have_value("")
    nothing_runs(engines)
    assert tab.translate("Bonjour à tous.")
    expect(tab.sentences).to_have_count(1)


def test_another_translation_of_a_sentence_is_one_click_away(tab: browser.TranslateTab) -> None:
    before = tab.translate(FRENCH)
    tab.sentences.nth(1).click()
    group = tab.page.get_by_role("group", name=re.compile("Le chat est sur la table"))
    expect(group).to_be_visible(timeout=30_000)
    choices = group.get_by_role("radio")
    assert choices.count() > 1
    assert choices.first.is_checked()
    group.locator("label").last.click()
    expect(tab.sentences.nth(1)).not_to_have_text(before[1])
    after = tab.sentences.all_inner_texts()
    assert [after[0], after[2]] == [before[0], before[2]]


def test_history_survives_a_reload_and_can_be_deleted(tab: browser.TranslateTab) -> None:
    first = tab.translate("Bonjour à tous.")
    tab.page.get_by_role("button", name="New translation").click()
    expect(tab.text).to_have_value("")
    tab.translate("Le chat est sur la table.")
    tab.page.reload()
    tab.settled()
    expect(tab.text).to_have_value("Le chat est sur la table.")
    tab.pick("Bonjour à tous.")
    expect(tab.text).to_have_value("Bonjour à tous.")
    expect(tab.sentences.first).to_have_text(first[0])
    tab.page.get_by_role("button", name="Delete").click()
    expect(tab.page.get_by_role("radio")).to_have_count(1)
    tab.page.reload()
    tab.settled()
    expect(tab.page.get_by_role("radio")).to_have_count(1)


SUBTITLES = "1\n00:00:01,000 --> 00:00:02,500\n<i>Bonjour à tous.</i>\n\n2\n00:00:03,000 --> 00:00:04,000\nMerci !\n"


def word_file(path: Path) -> Path:
    document = docx.Document()
    document.add_heading("Le titre", 1)
    document.add_paragraph("Le chat est sur la table.").runs[0].bold = True
    document.save(str(path))
    return path


def test_files_are_uploaded_translated_and_downloaded(tab: browser.TranslateTab, tmp_path: Path) -> None:
    tab.page.get_by_role("tab", name="File").click()
    (tmp_path / "film.srt").write_text(SUBTITLES)
    (tmp_path / "page.md").write_text("# Le titre\n\n`x = 1` Le chat est sur la table.\n")
    (tmp_path / "note.txt").write_text("Le chat est sur la table.\n\n  12 345\nIl fait beau aujourd'hui.\n")
    names = ("film.srt", "lettre.docx", "page.md", "note.txt")
    word_file(tmp_path / "lettre.docx")
    for path in (tmp_path / name for name in names):
        if tab.page.get_by_label("Clear").or_(tab.page.get_by_label("Remove this file")).first.is_visible():
            tab.page.get_by_label("Clear").or_(tab.page.get_by_label("Remove this file")).first.click()
        tab.page.locator("#file input[type=file]").set_input_files(path)
        expect(tab.page.locator("#file")).to_contain_text(path.stem)
        tab.page.get_by_role("button", name="Translate file").click()
        download = tab.page.locator("#download")
        expect(download).to_contain_text(f"{path.stem}.de{path.suffix}", timeout=60_000)
        expect(tab.page.locator("progress")).to_have_attribute("value", "2")
        with tab.page.expect_download() as arrived:
            download.click()
        assert arrived.value.suggested_filename == f"{path.stem}.de{path.suffix}"
        arrived.value.save_as(tmp_path / "out")
        data = (tmp_path / "out").read_bytes()
        if path.suffix == ".srt":
            one, two = srt.parse(data.decode())
            assert [str(one.start), str(one.end), str(two.start)] == ["0:00:01", "0:00:02.500000", "0:00:03"]
            assert re.fullmatch(r"<i>.+</i>", one.content)
        elif path.suffix == ".md":
            assert re.fullmatch(r"# .+\n\n`x = 1` .+\n", data.decode())
        elif path.suffix == ".txt":
            assert re.fullmatch(r".+\n\n  12 345\n.+\n", data.decode())
        else:
            heading, paragraph = docx.Document(io.BytesIO(data)).paragraphs
            assert heading.style.name == "Heading 1"
            assert paragraph.runs[0].bold
            assert paragraph.text


def test_a_file_can_be_stopped(tab: browser.TranslateTab, engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(LONG)
    tab.text.fill("Bonjour à tous.")
    tab.page.get_by_role("tab", name="File").click()
    tab.page.locator("#file input[type=file]").set_input_files(tmp_path / "long.txt")
    expect(tab.page.locator("#file")).to_contain_text("long")
    tab.page.get_by_role("button", name="Translate file").click()
    expect(tab.page.locator("label.progress")).to_contain_text("French to German: 1", timeout=20_000)
    assert stats(engines).running > 1
    tab.page.locator("#stop-file").click()
    expect(tab.notice).to_have_text("Stopped: there is no file.")
    nothing_runs(engines)
    expect(tab.page.locator("#download")).to_be_hidden()
    tab.page.get_by_role("tab", name="Text").click()
    expect(tab.text).to_have_value("Bonjour à tous.")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.pdf", b"%PDF-1.7 text", "cannot be translated: files of these kinds can: .docx, .md, .srt, .txt"),
        ("broken.docx", b"PK\x03\x04 broken", "is broken, or no Word document"),
        ("empty.txt", b" \n", "has no text in it"),
    ],
)
def test_bad_files_are_a_sentence(tab: browser.TranslateTab, tmp_path: Path, name: str, data: bytes, says: str) -> None:
    tab.page.get_by_role("tab", name="File").click()
    tab.page.get_by_role("button", name="Translate file").click()
    expect(tab.notice).to_have_text("Choose a file first.")
    (tmp_path / name).write_bytes(data)
    tab.page.locator("#file input[type=file]").set_input_files(tmp_path / name)
    expect(tab.page.locator("#file")).to_contain_text(name.split(".")[0])
    tab.page.get_by_role("button", name="Translate file").click()
    expect(tab.notice).to_contain_text(says)


def test_bad_texts_are_a_sentence_and_the_next_one_works(tab: browser.TranslateTab) -> None:
    tab.go.click()
    expect(tab.notice).to_have_text("Write a text first.")
    tab.text.fill("table")
    tab.go.click()
    expect(tab.notice).to_contain_text("It is not sure which language this text is in (French or English or Spanish?)")
    tab.text.fill("12 345 !")
    tab.go.click()
    expect(tab.notice).to_contain_text("no letters", timeout=20_000)
    tab.text.fill("Das ist ein deutscher Satz, und er ist es auch nach einer Weile noch.")
    tab.go.click()
    expect(tab.notice).to_contain_text("in German already", timeout=20_000)
    tab.text.fill("Энэ бол монгол хэл дээр бичигдсэн өгүүлбэр бөгөөд манай загвар энэ хэлийг мэдэхгүй.")
    tab.go.click()
    expect(tab.notice).to_contain_text("in Mongolian, a language that the model lacks")
    tab.page.evaluate(
        """() => { const area = document.querySelector('#source textarea'); area.value = 'mot '.repeat(2500000);
                   area.dispatchEvent(new Event('input', {bubbles: true})); }"""
    )
    tab.go.click()
    expect(tab.notice).to_contain_text("This text has 10,000,000 characters", timeout=60_000)
    assert tab.translate("Bonjour à tous.")
    expect(tab.notice).to_have_count(0)


def test_a_model_that_fails_in_the_middle_is_a_sentence_and_the_next_text_works(
    tab: browser.TranslateTab, engines: Engines, fault: Fault
) -> None:
    tab.text.fill(LONG)
    tab.go.click()
    expect(tab.sentences.first).not_to_have_text("…", timeout=20_000)
    fault.begin()
    expect(tab.notice).to_contain_text("the model is broken", timeout=20_000)
    fault.end()
    nothing_runs(engines)
    assert tab.translate("Bonjour à tous.")
    expect(tab.notice).to_have_count(0)


def test_by_keyboard_alone(tab: browser.TranslateTab) -> None:
    page = tab.page
    expect(tab.text).to_be_focused()
    page.keyboard.type("Bonjour à tous.")
    page.keyboard.press("Tab")
    for _ in range(30):
        if page.evaluate("document.activeElement.innerText") == "Translate":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(tab.result).to_have_attribute("aria-busy", "false", timeout=60_000)
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("'sentence' in document.activeElement.dataset"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#alternatives")).to_be_visible(timeout=30_000)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, [role=button], a[href]')]
            .filter(e => e.offsetParent && !(e.innerText || e.getAttribute('aria-label') || e.title ||
                         (e.labels && e.labels.length && e.labels[0].innerText)))
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_a_phone_nothing_scrolls_sideways(new_translate: New, dark: bool) -> None:
    tab = new_translate(size=browser.PHONE, dark=dark)
    assert tab.sideways() == 0
    assert tab.language("From").evaluate("e => e.scrollWidth <= e.clientWidth"), "a name is cut off"
    tab.translate("Bonjour à tous. " + "longueur" * 30)
    assert tab.sideways() == 0
    tab.page.get_by_role("tab", name="File").click()
    assert tab.sideways() == 0
    assert tab.outside == []
