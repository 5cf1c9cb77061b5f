"""Messages between two of our processes: bytes with their length before them, over a pair of sockets.

`spawn` starts a program with one end of such a pair; `Channel.of_descriptor` is the other end, in that program. What
the bytes mean is said by those who send them.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

LONGEST = 1 << 30
"""Bytes of a message. A prompt of a million tokens takes five million."""
_HEAD = 4


class ChannelClosedError(OSError):
    """The other end is gone, or this one was closed."""


class Channel:
    """One end. Any thread may send; one at a time may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._ready = select.poll()
        self._ready.register(end, select.POLLIN)

    @classmethod
    def of_descriptor(cls, descriptor: int) -> Channel:
        """In a process that was started by `spawn`. Its own children do not get the socket: it would stay open."""
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """For whoever waits for several things at once: readable when something came. A message may be here already,
        so receive until there is none."""
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Blocks while the other end does not read. Raises `ChannelClosedError`."""
        if len(message) > LONGEST:
            raise ValueError(f"a message of {len(message)} bytes: {LONGEST} is the most")
        try:
            with self._sending:
                self._socket.sendall(len(message).to_bytes(_HEAD, "big") + message)
        except OSError as error:
            raise ChannelClosedError("the other process is gone") from error

    def receive(self, seconds: float | None = None) -> bytes:
        """Waits for a message: for so many seconds if told. Raises `ChannelClosedError`, or `TimeoutError`, after which
        it may be called again."""
        until = None if seconds is None else time.monotonic() + seconds
        length = int.from_bytes(self._take(_HEAD, until), "big")
        if length > LONGEST:
            raise ChannelClosedError("what came is no message")
        whole = self._take(_HEAD + length, until)[_HEAD:]
        del self._buffer[: _HEAD + length]
        return whole

    def _take(self, count: int, until: float | None) -> bytes:
        """The first `count` bytes, which stay in the buffer: a time-out must lose nothing."""
        while len(self._buffer) < count:
            # not by the socket's own time-out, which would hold for `send` too
            if until is not None and not self._ready.poll(max(until - time.monotonic(), 0) * 1000):
                raise TimeoutError("no whole message came")
            try:
                found = self._socket.recv(max(1 << 16, count - len(self._buffer)))
            except OSError as error:
                raise ChannelClosedError("the other process is gone") from error
            if not found:
                raise ChannelClosedError("the other process is gone")
            self._buffer += found
        return bytes(self._buffer[:count])

    def close(self) -> None:
        """Wakes whoever receives, at both ends. Safe to call twice."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def module_program(module: str) -> tuple[str, ...]:
    """The command that runs a module of ours."""
    return (sys.executable, "-P", "-m", module)


def spawn(
    program: Sequence[str], variables: Mapping[str, str] = MappingProxyType({})
) -> tuple[subprocess.Popen[bytes], Channel]:
    """Start `program` with the descriptor of its end of a channel as its last argument, and `variables` in its
    environment.

    It sees the modules that this process sees. It has a process group of its own: a Ctrl-C at the terminal is for its
    parent, which ends it in order. It ends by itself when the channel closes, so it does not outlive a parent that was
    killed.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [*program, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
            process_group=0, env={**os.environ, "PYTHONPATH": paths, **variables},
        )  # fmt: skip
    return process, Channel(ours)
