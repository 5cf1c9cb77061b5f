"""The chat app, used by a person: a real browser, the real default model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from conftest import Fault, nothing_runs, stats
from octavo_apps.engines import Engines
from playwright.sync_api import expect

New = Callable[..., browser.ChatTab]
LONG = "Write a long story about a cat."
"""Greedily, the default model goes on for thousands of tokens."""


@pytest.fixture
def chat(new_chat: New) -> Iterator[browser.ChatTab]:
    """A new chat with short answers; nothing may be asked of another host, and no script may fail."""
    tab = new_chat()
    tab.set_number("Most tokens", 32)
    tab.set_number("Temperature", 0)
    yield tab
    assert len(tab.requests) > 5, "no request was recorded"
    assert tab.outside == []
    assert tab.errors == []


def test_an_answer_streams_and_the_figures_are_those_of_the_engine(chat: browser.ChatTab) -> None:
    chat.set_number("Most tokens", 400)
    chat.begin(LONG)
    sizes = set()
    while chat.stop.is_visible():
        if chat.answers.count():
            sizes.add(len(chat.answers.last.inner_text()))
        chat.page.wait_for_timeout(30)
    assert len(sizes) > 5, "it came at once"
    assert re.fullmatch(r"\d+\.\d\d s", chat.figure("First token"))
    assert int(chat.figure("Tokens/s")) > 0
    cached, of = map(int, re.fullmatch(r"(\d+) of (\d+)", chat.figure("Cached")).groups())  # type: ignore[union-attr]
    assert 0 <= cached < of
    before = of
    chat.ask("And a dog?")
    cached, of = map(int, re.fullmatch(r"(\d+) of (\d+)", chat.figure("Cached")).groups())  # type: ignore[union-attr]
    assert cached >= before, "the second answer's prompt begins with the first"
    assert re.fullmatch(r"[\d.]+ \+ [\d.]+ of \d+ MB", chat.figure("KV memory"))


def test_stop_ends_the_request_in_the_engine_and_keeps_what_was_written(
    chat: browser.ChatTab, engines: Engines
) -> None:
    chat.set_number("Most tokens", 4096)
    chat.begin(LONG)
    expect(chat.answers.last).to_contain_text(re.compile(r"\w+"))
    chat.page.wait_for_timeout(300)
    assert stats(engines).blocks_used > 0
    chat.stop.click()
    chat.ended()
    nothing_runs(engines)
    expect(chat.answers.last).to_contain_text("Stopped.")
    assert len(chat.answers.last.inner_text()) > 20
    chat.set_number("Most tokens", 16)
    assert chat.ask("Say hello.")


def test_opening_another_conversation_ends_the_answer_and_keeps_what_was_written(
    chat: browser.ChatTab, engines: Engines
) -> None:
    chat.set_number("Most tokens", 4096)
    chat.begin(LONG)
    expect(chat.answers.last).to_contain_text(re.compile(r"\w+"))
    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.questions).to_have_count(0)
    expect(chat.send).to_be_visible()
    nothing_runs(engines)
    chat.set_number("Most tokens", 16)
    chat.ask("Say hello.")
    expect(chat.questions).to_have_text("Say hello.")
    for _ in range(2):  # from the session, then from the browser's storage
        chat.pick("Write a long story")
        expect(chat.answers.last).to_contain_text("Stopped.")
        chat.page.reload()
        chat.settled()
        expect(chat.answers.last).to_contain_text("Stopped.")


def test_closing_the_tab_ends_the_request_in_the_engine(new_chat: New, engines: Engines) -> None:
    tab = new_chat()
    tab.set_number("Most tokens", 8192)
    tab.set_number("Temperature", 0)
    tab.begin(LONG)
    expect(tab.answers.last).to_contain_text(re.compile(r"\w+"))
    assert stats(engines).running == 1
    steps = stats(engines).steps
    tab.page.close()
    nothing_runs(engines)
    assert stats(engines).steps - steps < 2000, "it ran to its end"


def test_two_tabs_are_answered_in_one_batch(chat: browser.ChatTab, new_chat: New, engines: Engines) -> None:
    other = new_chat(beside=chat)
    for tab in (chat, other):
        tab.set_number("Most tokens", 4096)
        tab.set_number("Temperature", 0)
    chat.begin(LONG)
    other.begin(LONG)
    expect(other.answers.last).to_contain_text(re.compile(r"\w+"))
    most = 0
    while chat.stop.is_visible() and other.stop.is_visible() and most < 2:
        most = max(most, stats(engines).running)
    assert most == 2
    assert stats(engines).largest_batch >= 2
    expect(other.page.locator(".strip > div", has_text="Shared").locator("dd")).to_have_text("2")
    for tab in (chat, other):
        tab.stop.click()
        tab.ended()


def test_regenerate_edit_and_undo(chat: browser.ChatTab) -> None:
    first = chat.ask("What is the capital of France?")
    chat.set_number("Temperature", 1.5)
    chat.page.get_by_role("button", name="Retry").click()
    expect(chat.answers.last).not_to_have_text(first)
    chat.ended()
    expect(chat.answers).to_have_count(1)
    chat.ask("What is the capital of Italy?")

    chat.page.get_by_role("button", name="Edit").first.click()
    area = chat.page.locator("#chat textarea")
    expect(area).to_have_value("What is the capital of France?")
    area.fill("Say <hello> & `<goodbye>`")
    chat.page.get_by_role("button", name="Submit").click()
    expect(chat.questions).to_have_count(1)
    expect(chat.questions).to_have_text("Say <hello> & <goodbye>")
    chat.ended()
    expect(chat.answers).to_have_count(1)

    chat.page.get_by_role("button", name="Undo").click()
    expect(chat.questions).to_have_count(0)
    expect(chat.box).to_have_value("Say <hello> & `<goodbye>`")


def test_clear_begins_a_new_conversation_and_the_old_one_stays_in_the_list(chat: browser.ChatTab) -> None:
    chat.ask("What is water?")
    chat.page.get_by_role("button", name="Clear").click()
    expect(chat.questions).to_have_count(0)
    chat.ask("What is fire?")
    expect(chat.questions).to_have_count(1)
    expect(chat.page.get_by_role("radio")).to_have_count(2)
    chat.pick("What is water?")
    expect(chat.questions).to_have_text("What is water?")


def test_the_system_prompt_and_the_seed_count(chat: browser.ChatTab) -> None:
    chat.set_number("Temperature", 1)
    seed = chat.page.get_by_label("Seed")
    seed.fill("7")
    seed.press("Tab")
    plain = chat.ask("Who are you?")
    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.questions).to_have_count(0)
    assert chat.ask("Who are you?") == plain
    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.questions).to_have_count(0)
    chat.page.get_by_label("System prompt").fill("You are a pirate called Morgan. Always say that your name is Morgan.")
    assert chat.ask("Who are you?") != plain


def test_conversations_survive_a_reload_and_can_be_downloaded_and_deleted(
    chat: browser.ChatTab, new_chat: New, tmp_path: Path
) -> None:
    answer = chat.ask("What is the capital of France?")
    chat.page.reload()
    chat.settled()
    expect(chat.questions).to_have_text("What is the capital of France?")
    expect(chat.answers).to_have_text(answer)

    with chat.page.expect_download() as download:
        chat.page.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / "chat.md")
    text = (tmp_path / "chat.md").read_text()
    assert download.value.suggested_filename.endswith(".md")
    assert "## You\n\nWhat is the capital of France?" in text
    assert answer.splitlines()[0] in text

    other = new_chat()  # another browser knows nothing of it
    expect(other.page.get_by_role("radio")).to_have_count(0)
    beside = new_chat(beside=chat)  # a new tab begins a new one, and lists it
    expect(beside.questions).to_have_count(0)
    expect(beside.page.get_by_role("radio", name="What is the capital of France?")).to_have_count(1)

    chat.page.get_by_role("button", name="Delete").click()
    expect(chat.questions).to_have_count(0)
    chat.page.reload()
    chat.settled()
    expect(chat.page.get_by_role("radio")).to_have_count(0)


HOSTILE = (
    '<img src="https://example.com/a.png" onerror="document.title=1">\n\n![x](https://example.com/b.png)\n\n'
    "<script>document.title = 2</script>\n\n**bold** and `<i>code</i>`\n\n```python\nprint('<b>' + '![x](y)')\n```\n"
)


def stored(tab: browser.ChatTab, *turns: dict[str, Any]) -> None:
    """What the model said, as the browser keeps it; then the page is loaded anew."""
    one = {"id": "abc", "system": "", "changed": 1.0, "turns": [{"role": "user", "content": "Hello"}, *turns]}
    tab.page.evaluate("text => localStorage.setItem('octavo.chat.abc', text)", json.dumps(one))
    tab.page.evaluate("sessionStorage.setItem('octavo.chat.open', 'abc')")
    tab.page.reload()
    tab.settled()


def test_output_is_shown_as_markdown_and_cannot_bring_html_or_pictures(chat: browser.ChatTab) -> None:
    stored(chat, {"role": "assistant", "content": HOSTILE})
    answer = chat.answers.last
    expect(answer).to_contain_text('<img src="https://example.com/a.png"')
    expect(answer).to_contain_text("<script>document.title = 2</script>")
    assert answer.locator("img, script, i").count() == 0
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("code").first.inner_text() == "<i>code</i>"
    assert answer.locator("pre .token").count() > 0, "code is not highlighted"
    assert "print('<b>' + '![x](y)')" in answer.locator("pre").inner_text()
    assert chat.page.title() == "Octavo chat"
    refused = chat.page.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'refused')")
    assert refused == "refused"
    chat.requests = [url for url in chat.requests if url != "https://example.com/"]  # the one that was just tried


def test_thoughts_are_folded_away(chat: browser.ChatTab) -> None:
    stored(chat, {"role": "assistant", "content": "Hi.", "thinking": "They greet me."})
    expect(chat.page.get_by_text("They greet me.")).to_be_hidden()
    chat.page.get_by_text("Thoughts").click()
    expect(chat.page.get_by_text("They greet me.")).to_be_visible()


def test_bad_messages_are_refused_with_a_sentence_and_the_next_one_works(chat: browser.ChatTab) -> None:
    chat.box.press("Enter")
    expect(chat.notice).to_have_text("Write a message first.")
    chat.page.evaluate(
        """() => { const area = document.querySelector('#message textarea'); area.value = 'word '.repeat(2000000);
                   area.dispatchEvent(new Event('input', {bubbles: true})); }"""
    )
    chat.send.click()
    expect(chat.notice).to_contain_text("This message has 9,999,999 characters", timeout=60_000)
    expect(chat.questions).to_have_count(0)
    chat.box.fill("a b c d " * 6000)  # this one could fit, and does not
    chat.send.click()
    expect(chat.notice).to_contain_text("shorten it", timeout=60_000)
    chat.ask("What is the capital of France?")
    expect(chat.notice).to_have_count(0)


def test_a_bad_model_is_a_sentence_and_the_good_one_works(chat: browser.ChatTab) -> None:
    model = chat.page.get_by_label("Model", exact=True)
    good = model.input_value()
    model.fill("./no-such-model")
    model.press("Enter")
    chat.box.fill("Hello")
    chat.box.press("Enter")
    expect(chat.notice).to_contain_text("nothing is there")
    expect(chat.box).to_have_value("Hello")
    model.fill(good)
    model.press("Enter")
    assert chat.ask("Hello")


def test_a_model_that_fails_in_the_middle_is_a_sentence_and_the_next_message_works(
    chat: browser.ChatTab, engines: Engines, fault: Fault
) -> None:
    chat.set_number("Most tokens", 4096)
    chat.begin(LONG)
    expect(chat.answers.last).to_contain_text(re.compile(r"\w+"))
    fault.begin()
    chat.ended()
    fault.end()
    expect(chat.notice).to_contain_text("the model is broken")
    expect(chat.answers.last).to_contain_text("The answer ends here, because the model failed.")
    nothing_runs(engines)
    chat.set_number("Most tokens", 16)
    assert chat.ask("Say hello.")
    expect(chat.notice).to_have_count(0)


def test_by_keyboard_alone(chat: browser.ChatTab) -> None:
    """From the message, which has the focus: send, then walk to every control that is there by Tab."""
    page = chat.page
    page.reload()
    chat.settled()
    expect(chat.box).to_be_focused()
    page.keyboard.type("What is the capital of France?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Say it in one word.")
    page.keyboard.press("Enter")
    expect(chat.questions).to_have_text(re.compile(r"France\?\s*Say it"))
    expect(chat.answers).to_have_count(1)
    chat.ended()
    names: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate(
                "(e => e.getAttribute('aria-label') || (e.labels && e.labels[0] || e).innerText || '')"
                "(document.activeElement)"
            ).strip()
        )
    for wanted in ("New chat", "Download", "Delete", "Retry", "Undo", "Edit", "Copy message", "Clear", "Send"):
        assert wanted in names, names
    while page.evaluate("document.activeElement.innerText") != "New chat":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(chat.questions).to_have_count(0)


def test_everything_that_can_be_pressed_or_filled_has_a_name(chat: browser.ChatTab) -> None:
    chat.ask("Hello")
    nameless = chat.page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, [role=button], a[href]')]
            .filter(e => e.offsetParent && !(e.innerText || e.getAttribute('aria-label') || e.title ||
                         (e.labels && e.labels.length && e.labels[0].innerText)))
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_a_phone_nothing_scrolls_sideways(new_chat: New, dark: bool) -> None:
    tab = new_chat(size=browser.PHONE, dark=dark)
    expect(tab.box).to_be_in_viewport()
    code = "```python\n" + "x = " + "1 + " * 80 + "1\n```\n\n|" + "a long head|" * 12 + "\n|" + "-|" * 12 + "\n"
    stored(tab, {"role": "assistant", "content": code + "unbroken" * 60})
    expect(tab.answers.last).to_contain_text("unbroken")
    assert tab.sideways() == 0
    tab.settings()
    assert tab.sideways() == 0
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
    assert brightness < 150 if dark else brightness > 600
    assert tab.outside == []
