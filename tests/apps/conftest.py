"""One server of each app and one browser for all tests of the apps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("gradio", reason="pip install 'octavo[apps]'")
pytest.importorskip("playwright", reason="pip install 'octavo[dev]'")

import browser as real
from octavo_apps import serve
from octavo_apps.chat import ChatPage
from octavo_apps.engines import Engines
from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    executable = real.chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install -y chromium")
    with real.browser(executable) as opened:
        yield opened


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """The default model, as both apps have it without an argument."""
    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def chat_address(engines: Engines) -> Iterator[str]:
    page = ChatPage(engines)
    yield serve(page.blocks, block=False)
    page.blocks.close()


@pytest.fixture
def new_chat(chromium: Browser, chat_address: str) -> Iterator[Callable[..., real.ChatTab]]:
    """Opens the chat app in a browser that has never seen it; with `beside`, in another tab of that one's browser."""
    contexts = []

    def open_one(
        beside: real.ChatTab | None = None, size: tuple[int, int] = real.LAPTOP, dark: bool = False
    ) -> real.ChatTab:
        if beside is None:
            context = chromium.new_context(
                viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
            )
            contexts.append(context)
        else:
            context = beside.page.context
        context.set_default_timeout(20_000)
        tab = real.ChatTab(context.new_page(), chat_address)
        tab.open()
        return tab

    yield open_one
    for context in contexts:
        context.close()
