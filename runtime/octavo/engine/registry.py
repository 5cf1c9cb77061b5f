"""One engine per configuration in a process. `acquire` starts it or joins it, `Engine.release` gives it back; the last
one closes.

Ten chains that name the same model share one engine, one KV cache and one batch.
"""

from __future__ import annotations

import atexit
import os
import threading
from typing import Protocol

from octavo.config import EngineConfig
from octavo.engine.start import IN_PROCESS, Engine
from octavo.host_memory import collector_paused, memory_goes_back
from octavo.models.sources import Progress


class Placement(Protocol):
    """Where an engine runs. Equal placements share engines."""

    def start(self, config: EngineConfig, progress: Progress | None) -> Engine:
        """A running engine. Raises what is wrong with the settings or the files."""

    def __hash__(self) -> int: ...


_Key = tuple[EngineConfig, Placement]
_engines: dict[_Key, Engine] = {}
_lock = threading.RLock()
_starting: dict[_Key, threading.Lock] = {}


def _start_anew() -> None:
    """In a forked child: the parent's engines do not run here, and its locks may be held by threads that are gone."""
    global _lock
    _lock = threading.RLock()
    _engines.clear()
    _starting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def acquire(
    config: EngineConfig, progress: Progress | None = None, placement: Placement = IN_PROCESS
) -> Engine:
    """The engine of this configuration, started if there is none. Callers of one configuration wait for the same
    start."""
    key = (config, placement)
    with _lock:
        start = _starting.setdefault(key, threading.Lock())
    with start:
        with _lock:
            engine = _engines.get(key)
            if engine is not None and not engine.service.closed:
                engine.users += 1
                return engine
        with collector_paused(), memory_goes_back():
            engine = placement.start(config, progress)
        with _lock:
            engine.users = 1
            _engines[key] = engine
        return engine


def release(engine: Engine) -> bool:
    """One user less; the last one closes the engine. True for that one: it should let go of the engine and then call
    `give_back_memory`."""
    with _lock:
        engine.users -= 1
        last = engine.users <= 0
        if last:
            for key in [key for key, other in _engines.items() if other is engine]:
                del _engines[key]
    if last:
        engine.service.close()
    return last


def running() -> list[EngineConfig]:
    """What the engines are that have users, one entry each. For tests and reports."""
    with _lock:
        return [config for config, _ in _engines]


@atexit.register
def _close_all() -> None:
    """At exit, end the threads in order: a thread that runs torch while the interpreter goes away can crash it."""
    for engine in list(_engines.values()):
        engine.service.close()
