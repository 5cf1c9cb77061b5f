"""`post`: how events of an engine's thread get to an event loop. Called by `AsyncLLM` and by the server."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable

from octavo.engine.request import Sink, TokenEvent


class Post:
    """Hands events of the engine's thread over to one event loop: all that a step brings in one go, as waking a loop
    costs more than the rest."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._waiting: deque[tuple[Callable[[TokenEvent], None], TokenEvent]] = deque()
        self._on_the_way = False

    def put(self, take: Callable[[TokenEvent], None], event: TokenEvent) -> None:
        """Call `take(event)` soon on the loop; `take` must not raise. Any thread."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("the event loop was closed")
        self._waiting.append((take, event))
        if not self._on_the_way:
            self._on_the_way = True  # before it is: it may arrive at once
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._on_the_way = False  # first: what is put from here on may come too late for this round
        while self._waiting:
            take, event = self._waiting.popleft()
            take(event)

    def sink(self, take: Callable[[TokenEvent], None]) -> Sink:
        return lambda event: self.put(take, event)


_posts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Post] = weakref.WeakKeyDictionary()


def post() -> Post:
    """That of the running loop."""
    loop = asyncio.get_running_loop()
    return _posts.setdefault(loop, Post(loop))
