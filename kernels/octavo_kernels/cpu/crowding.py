"""How many threads of a team run its programs while other processes want the same cores.

A thread that waits for a core holds up all others at the next barrier, on two shared cores for longer than one thread
needs for everything. So a thread is left out when waiting has cost too much (`barrier.meet` decides, within a program),
and asked again after a while, longer each time that it was in vain. Used by `program.Team`.
"""

from __future__ import annotations

import ctypes
import time

from octavo_kernels.cpu import barrier

SPAN = 200_000_000
"""Nanoseconds of running after which what was lost before counts half, and a thread that was asked again has stayed."""
SOON, LATE = 250_000_000, 4_000_000_000
"""Nanoseconds until a thread is asked again: first, and at most. Asking in vain costs some 10 ms."""


class Crowding:
    """Of the team whose memory this is."""

    def __init__(self, memory: int, threads: int) -> None:
        self.threads = self._most = threads
        self._turn, self._lost, self._since, limit = (
            ctypes.c_int64.from_address(memory + at)
            for at in (barrier.TURN, barrier.LOST, barrier.SINCE, barrier.LIMIT)
        )
        limit.value = 1
        self._since.value = self._ended = time.monotonic_ns()
        self._asked = False  # a thread was, and has not stayed for long yet
        self._ask_at, self._pause = 0, SOON

    def before(self) -> int:
        """Threads for the program that comes next."""
        now = time.monotonic_ns()
        self._since.value += now - self._ended  # between programs nothing is lost
        if self.threads < self._most and now >= self._ask_at:
            self.threads += 1
            self._asked, self._ask_at = True, now + self._pause
            self._since.value, self._lost.value = now, 0
        elif now - self._since.value > SPAN:
            self._since.value = now - (now - self._since.value) // 2
            self._lost.value //= 2
            if self._asked:
                self._asked, self._pause = False, SOON
        return self.threads

    def after(self) -> None:
        """The program is done."""
        self._ended = time.monotonic_ns()
        left = self._turn.value >> 32
        if left < self.threads:
            self.threads = left
            self._pause = min(2 * self._pause, LATE) if self._asked else SOON
            self._asked, self._ask_at = False, self._ended + self._pause
