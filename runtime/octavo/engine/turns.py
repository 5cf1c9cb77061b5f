"""Engines of one process share its cores by taking turns: a step has the cores that it uses to itself.

The threads of a step meet at a barrier some hundred times. If those of another engine run on the same cores, each
meeting waits for the system to change threads. So a step waits until its cores are free, first come, first served:
engines that have work alternate, and engines that use few threads each run at the same time.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from octavo.host import usable_cores


class Cores:
    """A number of cores, given out in the order in which they were asked for: a large wish is not passed by small
    ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.start_anew()

    def start_anew(self) -> None:
        self._free = self.count
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def take(self, count: int) -> None:
        with self._lock:
            if count <= self._free and not self._waiting:
                self._free -= count
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append((count, gate))
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C, where the main thread runs an engine: nobody takes what was meant for it
            with self._lock:
                if (count, gate) in self._waiting:
                    self._waiting.remove((count, gate))
                    count = 0
            self.give(count)
            raise

    def give(self, count: int) -> None:
        with self._lock:
            self._free += count
            while self._waiting and self._waiting[0][0] <= self._free:
                wanted, gate = self._waiting.popleft()
                self._free -= wanted
                gate.release()


class Turn:
    """An engine's turns, one step after the other, each with as many cores as it has threads."""

    def __init__(self, cores: Cores, threads: int) -> None:
        self._cores, self._count = cores, min(threads, cores.count)

    def __enter__(self) -> None:
        self._cores.take(self._count)

    def __exit__(self, *_: object) -> None:
        self._cores.give(self._count)


PROCESS_CORES = Cores(usable_cores())
"""Those of this process, for all its engines on the CPU."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS_CORES.start_anew)  # the parent's engines do not run here
