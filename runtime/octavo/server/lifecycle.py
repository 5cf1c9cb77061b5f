"""How a server ends. The first SIGTERM or SIGINT lets it drain: `/ready` says 503 at once, new work is refused with a
503, what runs goes on until it is done or the deadline comes; then the process ends with 0. A second signal ends it
now. Made by `listen.serve`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

logger = logging.getLogger("octavo.server")
LOOK_SECONDS = 0.02
DISCONNECT_SECONDS = 2
"""For connections to close after the last answer, or after the deadline."""


class DrainingServer(uvicorn.Server):
    """Uvicorn's server with this way to end.

    drain: called at the first signal, on the event loop; new work is refused from then on. busy: there are calls that
    run. drain_seconds: for them to end by themselves."""

    def __init__(
        self, config: uvicorn.Config, *, drain: Callable[[], None], busy: Callable[[], bool], drain_seconds: float
    ) -> None:
        config.timeout_graceful_shutdown = DISCONNECT_SECONDS
        super().__init__(config)
        self._drain, self._busy, self._drain_seconds = drain, busy, drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal's handler. Unlike uvicorn's, it does not have the signal raised again at the end: an end
        that was asked for is no failure."""
        self._signals += 1
        if self._signals > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        logger.info("ending", extra={"drain_seconds": self._drain_seconds})
        self._drain()
        self._draining = asyncio.create_task(self._until_done())

    async def _until_done(self) -> None:
        deadline = time.monotonic() + self._drain_seconds
        while self._busy() and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)
        if self._busy():
            logger.warning("ending with calls that still run: their time is over")
        self.should_exit = True
