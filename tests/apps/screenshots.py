"""Makes the two pictures in the README, from the running apps: `python tests/apps/screenshots.py`.

The pictures hold what the default model really said.
"""

from __future__ import annotations

import io
from pathlib import Path

import browser
from octavo_apps import serve
from octavo_apps.chat import ChatPage
from octavo_apps.engines import Engines
from octavo_apps.translate import TranslatePage
from PIL import Image
from playwright.sync_api import Page

DOCS = Path(__file__).parents[2] / "docs"
SIZE = (1120, 790)
LARGEST = 150_000


def main() -> None:
    executable = browser.chromium()
    if executable is None:
        raise SystemExit("no Chromium on this machine: apt-get install -y chromium")
    engines = Engines()
    chat, translate = ChatPage(engines).blocks, TranslatePage(engines).blocks
    with browser.browser(executable) as opened:
        chat_tab = browser.ChatTab(new_page(opened), serve(chat, block=False))
        chat_tab.open()
        chat_tab.set_number("Temperature", 0)
        chat_tab.page.get_by_role("button", name="Model and settings").click()
        chat_tab.ask("What is the difference between a list and a tuple?")
        chat_tab.page.get_by_role("button", name="New chat").click()
        chat_tab.ask("How do I print a list in Python?")
        save(chat_tab.page, "app-chat.png")
        tab = browser.TranslateTab(new_page(opened), serve(translate, block=False))
        tab.open()
        tab.choose("To", "English")
        tab.translate("Le chat est sur la table. La maison est grande.\n\nLe train part à midi.")
        tab.sentences.first.click()
        tab.page.locator("#alternatives").wait_for()
        save(tab.page, "app-translate.png")
    for blocks in (chat, translate):
        blocks.close()
    engines.close()


def new_page(opened: browser.Browser) -> Page:
    return opened.new_context(viewport={"width": SIZE[0], "height": SIZE[1]}).new_page()


def save(page: Page, name: str) -> None:
    """With few colours, so that it is small."""
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(64)
    path = DOCS / name
    picture.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size // 1000} kB")
    assert size < LARGEST, "too large for a README"


if __name__ == "__main__":
    main()
