"""One server of each app for all tests of the apps, and a browser for each file of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("gradio", reason="pip install 'octavo[apps]'")
pytest.importorskip("playwright", reason="pip install 'octavo[dev]'")

import browser as real
from octavo.engine.contract import EngineStats
from octavo.engine.core import EngineCore
from octavo_apps import serve
from octavo_apps.chat import ChatPage
from octavo_apps.engines import Engines
from octavo_apps.translate import TranslatePage
from playwright.sync_api import Browser, BrowserContext, ViewportSize

NewContext = Callable[..., BrowserContext]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """For one module: while it is there, Playwright's event loop runs in the main thread, and no other can."""
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


@pytest.fixture(scope="session")
def translate_address(engines: Engines) -> Iterator[str]:
    page = TranslatePage(engines)
    yield serve(page.blocks, block=False)
    page.blocks.close()


@pytest.fixture
def new_context(chromium: Browser) -> Iterator[NewContext]:
    """A browser that has never seen the app."""
    contexts = []

    def open_one(size: tuple[int, int] = real.LAPTOP, dark: bool = False) -> BrowserContext:
        viewport: ViewportSize = {"width": size[0], "height": size[1]}
        context = chromium.new_context(viewport=viewport, color_scheme="dark" if dark else "light")
        context.set_default_timeout(20_000)
        contexts.append(context)
        return context

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture
def new_chat(new_context: NewContext, chat_address: str) -> Callable[..., real.ChatTab]:
    """Opens the chat app in a new browser, or in another tab of the one `beside`."""

    def open_one(beside: real.ChatTab | None = None, **how: Any) -> real.ChatTab:
        tab = real.ChatTab((beside.page.context if beside else new_context(**how)).new_page(), chat_address)
        tab.open()
        return tab

    return open_one


@pytest.fixture
def new_translate(new_context: NewContext, translate_address: str) -> Callable[..., real.TranslateTab]:
    """Opens the translation app in a new browser."""

    def open_one(**how: Any) -> real.TranslateTab:
        tab = real.TranslateTab(new_context(**how).new_page(), translate_address)
        tab.open()
        return tab

    return open_one


def stats(engines: Engines) -> EngineStats:
    return engines.started(engines.default).stats()


def nothing_runs(engines: Engines) -> None:
    """Soon: what was ended gives its blocks back between two steps."""
    for _ in range(100):
        now = stats(engines)
        if (now.running, now.waiting, now.blocks_used) == (0, 0, 0):
            return
        time.sleep(0.05)
    raise AssertionError(now)


class Fault:
    """A model that fails: every step raises, from `begin()` to `end()`."""

    def __init__(self, engines: Engines) -> None:
        self.service = engines.started(engines.default).engine.service
        self._launch: Any = None

    def begin(self) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise ArithmeticError("the model is broken")

        def break_it(core: EngineCore) -> Any:
            runner: Any = core.runner
            launch, runner.launch = runner.launch, fail
            return launch

        self._launch = self.service.call(break_it)

    def end(self) -> None:
        self.service.call(lambda core: setattr(core.runner, "launch", self._launch))


@pytest.fixture
def fault(engines: Engines) -> Fault:
    return Fault(engines)
