"""A real browser for the apps' tests: Debian's chromium, driven by Playwright. What a person does, by name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
LAPTOP, PHONE = (1280, 800), (390, 844)


def chromium() -> str | None:
    """Where this machine has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser(executable: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


@dataclass
class Tab:
    """A page of an app, all requests that it made, and what its console complained of."""

    page: Page
    address: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    @property
    def outside(self) -> list[str]:
        """Requests to any host but the app's."""
        return [url for url in self.requests if not url.startswith((self.address, "data:", "blob:"))]

    def open(self) -> None:
        self.page.goto(self.address)
        self.settled()

    def settled(self) -> None:
        """The page is ready for a person."""
        expect(self.page.locator("#message textarea, #source textarea")).to_be_focused(timeout=20_000)

    @property
    def notice(self) -> Locator:
        return self.page.locator(".notice")

    def pick(self, title: str) -> None:
        """Open an earlier conversation or translation."""
        self.page.locator(".list label", has_text=title).click()

    def sideways(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


class ChatTab(Tab):
    """The chat app."""

    @property
    def box(self) -> Locator:
        return self.page.get_by_label("Your message")

    @property
    def questions(self) -> Locator:
        return self.page.locator("#chat [data-testid=user]")

    @property
    def answers(self) -> Locator:
        return self.page.locator("#chat [data-testid=bot]")

    @property
    def send(self) -> Locator:
        return self.page.get_by_role("button", name="Send")

    @property
    def stop(self) -> Locator:
        return self.page.get_by_role("button", name="Stop")

    def begin(self, text: str) -> None:
        """Type and send; the answer goes on (Send comes back at its end)."""
        before = self.questions.count()
        self.box.fill(text)
        self.box.press("Enter")
        expect(self.questions).to_have_count(before + 1)

    def ended(self) -> None:
        expect(self.send).to_be_visible(timeout=240_000)

    def ask(self, text: str) -> str:
        """Type, send, and wait for the end of the answer."""
        before = self.answers.count()
        self.begin(text)
        self.ended()
        expect(self.answers).to_have_count(before + 1)
        return self.answers.last.inner_text()

    def settings(self) -> None:
        """Show them."""
        if self.page.locator(".side:not(.open)").count():
            self.page.get_by_label("Toggle Sidebar").click()
        if not self.page.get_by_label("System prompt").is_visible():
            self.page.get_by_role("button", name=re.compile("Model and settings")).click()

    def set_number(self, label: str, value: float) -> None:
        self.settings()
        number = self.page.get_by_label(f"number input for {label}")
        number.fill(str(value))
        number.press("Tab")

    def figure(self, name: str) -> str:
        """One figure of the strip."""
        return self.page.locator(".strip > div", has_text=name).locator("dd").inner_text()


class TranslateTab(Tab):
    """The translation app."""

    @property
    def text(self) -> Locator:
        return self.page.get_by_label("Text", exact=True).and_(self.page.locator("textarea"))

    @property
    def result(self) -> Locator:
        return self.page.get_by_role("region", name="Translation")

    @property
    def sentences(self) -> Locator:
        return self.result.get_by_role("button")

    @property
    def go(self) -> Locator:
        return self.page.get_by_role("button", name="Translate", exact=True)

    @property
    def stop(self) -> Locator:
        return self.page.get_by_role("button", name="Stop")

    def language(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True)

    def choose(self, label: str, name: str) -> None:
        """Search for a language by the beginning of its name, and take it."""
        self.language(label).click()
        self.page.keyboard.type(name)
        expect(self.page.get_by_role("option").first).to_contain_text(name)  # or Enter would take another
        self.page.keyboard.press("Enter")
        expect(self.page.get_by_role("option")).to_have_count(0)  # what was typed stands in the field before, too
        expect(self.language(label)).to_have_value(name)

    def translate(self, text: str) -> list[str]:
        """Type, press, wait for the end. The sentences that came."""
        self.text.fill(text)
        self.go.click()
        expect(self.result).to_have_attribute("aria-busy", "false", timeout=60_000)
        expect(self.go).to_be_visible(timeout=240_000)
        return self.sentences.all_inner_texts()
