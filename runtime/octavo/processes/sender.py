"""A thread that sends, for those who must not wait: a process that hangs does not read."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress

from octavo.processes.channel import Channel, ChannelClosedError


class Sender:
    """Of one channel. Any thread may call it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="octavo-sender", daemon=True).start()

    def put(self, message: bytes) -> None:
        """Send it soon, in its turn. Lost where the other end is gone."""
        self._waiting.put(message)

    def close(self) -> None:
        """Send nothing more. Safe to call twice."""
        self._waiting.put(None)

    def _run(self) -> None:
        with suppress(ChannelClosedError):
            while (message := self._waiting.get()) is not None:
                self._channel.send(message)
