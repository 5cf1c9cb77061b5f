"""`ChildService`: an `EngineService` for callers whose engine runs in a child process, and who watches over that.

A thread of its own reads what the process sends. When the process ends or hangs, the same thread puts another in its
place and tells it of all that runs. It gives up after some attempts in a row that brought nothing: then every request
ends with `EngineClosedError`, and so does who starts one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.child.ledger import Delivery, Ledger
from octavo.engine.child.messages import Abort, Answer, Ask, Failed, Files, FromEngine, Loading, Ready, Start, Step
from octavo.engine.child.processes import SPARES, EngineProcess, closed
from octavo.engine.contract import EngineStats
from octavo.engine.start import Limits
from octavo.errors import EngineClosedError, ForkedEngineError, QueueFullError, RequestFailedError
from octavo.models.sources import Progress

logger = logging.getLogger("octavo")
ATTEMPTS = 4
"""Processes in a row that ended without bringing anything, by nobody's known fault."""
SOUND_SECONDS = 30.0
"""One that ran for so long was sound, even if nobody asked anything of it: an engine that is idle for days may lose
several."""
STATS_SECONDS = 5.0


class ChildService:
    """`program`: the command of the process. The other arguments say which engine it is to be."""

    def __init__(self, program: tuple[str, ...], config: EngineConfig, files: Files) -> None:
        self._program, self._start = program, Start(config, files)
        self._max_queued = config.max_queued_requests
        self._ledger = Ledger()
        self._room = threading.Condition()  # its lock is that of everything here
        self._room_callbacks: list[Callable[[], None]] = []
        self._process: EngineProcess | None = None
        """The one that runs now and is ready."""
        self._coming: EngineProcess | None = None
        """The one that is to be ready next."""
        self._closing = False
        self._failure: EngineClosedError | None = None
        self._tickets: dict[int, tuple[threading.Event, list[EngineStats]]] = {}
        self._last_ticket = 0
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self.restarts = 0
        """How often the process was replaced."""

    def start(self, progress: Progress | None = None) -> Limits:
        """Wait until the engine is ready. Raises why it cannot be."""
        SPARES.join()
        try:
            process = SPARES.take(self._program)
            limits = self._begin(process, progress)
        except BaseException:
            SPARES.leave()
            raise
        self._process = process
        self._thread = threading.Thread(target=self._watch, args=(process,), name="octavo-watch", daemon=True)
        self._thread.start()
        SPARES.prepare(self._program)
        return limits

    def _begin(self, process: EngineProcess, progress: Progress | None) -> Limits:
        """Let a new process be the engine. Raises what its start raised, or `EngineClosedError`."""
        with self._room:
            self._coming = process
            closing = self._closing
        if closing:
            process.close()
        process.send(self._start)
        for message in process.receive(ready=False):
            if isinstance(message, Ready):
                return message.limits
            if isinstance(message, Failed):
                process.close()
                raise message.problem.error()
            if isinstance(message, Loading) and progress is not None:
                progress(message.label, message.done, message.total)
        raise closed(process.why)

    # ---------------------------------------------------------------- callers' side, any thread

    def submit(self, request: Any, *, wait: bool = False) -> None:
        """See `Service`."""
        self.check_process()
        with self._room:
            self._check_usable()
            while self._ledger.waiting >= self._max_queued:
                if not wait:
                    raise QueueFullError(
                        f"{self._max_queued} requests wait already: try again later, or raise max_queued_requests"
                    )
                self._room.wait()
                self._check_usable()
            self._ledger.open(request)
            self._send_new()

    def when_room(self, callback: Callable[[], None]) -> None:
        """See `Service`."""
        with self._room:
            if self._ledger.waiting >= self._max_queued and not self.closed:
                self._room_callbacks.append(callback)
                return
        callback()

    def abort(self, request: Any, index: int | None = None) -> None:
        """See `Service`. The caller has its last event at once, the process a little later."""
        if os.getpid() != self._pid:
            return
        with self._room:
            found = self._ledger.abort(request, index)
            if found is None:
                return
            entry, deliveries = found
            if entry.sent and self._process is not None:
                self._process.send(Abort(entry.number, index))
            self._send_new()
        self._deliver(deliveries)
        self._signal_room()

    def stats(self) -> EngineStats:
        """See `Service`. Raises `EngineClosedError` while the process is replaced."""
        self.check_process()
        done, box = threading.Event(), list[EngineStats]()
        with self._room:
            self._check_usable()
            if self._process is None:
                raise EngineClosedError("the engine's process is being replaced: ask again in some seconds")
            self._last_ticket += 1
            ticket = self._last_ticket
            self._tickets[ticket] = done, box
            self._process.send(Ask(ticket))
        done.wait(STATS_SECONDS)
        with self._room:
            self._tickets.pop(ticket, None)
        if not box:
            raise EngineClosedError("the engine's process does not answer: it is busy, or being replaced")
        return box[0]

    @property
    def closed(self) -> bool:
        return self._closing or self._failure is not None

    @property
    def failure(self) -> EngineClosedError | None:
        """Why it was given up."""
        return self._failure

    @property
    def pid(self) -> int | None:
        """Of the engine's process; None while it is replaced."""
        process = self._process
        return None if process is None else process.pid

    def close(self) -> None:
        """See `Service`."""
        if os.getpid() != self._pid:
            return  # a forked child must not end the parent's process
        with self._room:
            if self._closing:
                return
            self._closing = True
            processes = self._process, self._coming
        for process in filter(None, processes):
            process.close()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        self._end_all(EngineClosedError("the engine was closed before this request ended"))
        if self._thread is not None:
            SPARES.leave()

    def check_process(self) -> None:
        """See `Service`."""
        if os.getpid() != self._pid:
            raise ForkedEngineError("this engine belongs to the parent process: make a new one in the child")

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise EngineClosedError(str(self._failure)) from self._failure
        if self._closing:
            raise EngineClosedError("the engine was closed: make a new LLM")

    def _send_new(self) -> None:
        """With the lock: tell the process of what it does not have, in order."""
        if self._process is None:
            return
        for entry in self._ledger.next_to_send():
            entry.sent = True
            self._process.send(self._ledger.message(entry))

    def _signal_room(self) -> None:
        with self._room:
            self._room.notify_all()
            if not self._room_callbacks or (self._ledger.waiting >= self._max_queued and not self.closed):
                return
            callbacks, self._room_callbacks = self._room_callbacks, []
        for callback in callbacks:
            callback()

    # ---------------------------------------------------------------- the watching thread

    def _watch(self, process: EngineProcess) -> None:
        idle_ends = 0
        while True:
            brought, began = False, time.monotonic()
            for message in process.receive(ready=True):
                brought = brought or isinstance(message, Step)
                self._take(message)
            if self._closing:
                return
            sound = brought or time.monotonic() - began > SOUND_SECONDS
            idle_ends = 0 if sound else idle_ends + 1
            blamed = self._note_end(process)
            if blamed:
                idle_ends = 0
            found = self._replaced(process.why, idle_ends)
            if found is None:
                return
            process = found
            with self._room:
                self._process = process
                self._send_new()
            SPARES.prepare(self._program)

    def _note_end(self, process: EngineProcess) -> bool:
        """A process has ended. True: it is known why."""
        logger.warning("the engine's process ended and is replaced: %s", process.why)
        with self._room:
            self._process = None
            guilty = self._ledger.strike()
            delivery = None if guilty is None else self._ledger.fail(guilty, RequestFailedError(
                "the engine's process ended each time that it ran this request"
            ))  # fmt: skip
        if delivery is not None:
            self._deliver([delivery])
        return guilty is not None

    def _replaced(self, why: str, idle_ends: int) -> EngineProcess | None:
        """Another process, ready. None: this was closed, or gives up."""
        while not self._closing:
            if idle_ends >= ATTEMPTS:
                self._give_up(why)
                return None
            try:
                process = SPARES.take(self._program)
                self._begin(process, None)
            except Exception as error:
                why, idle_ends = str(error), idle_ends + 1
                if not self._closing:
                    logger.warning("the engine's process could not be replaced: %s", why)
                continue
            self.restarts += 1
            return process
        return None

    def _give_up(self, why: str) -> None:
        error = EngineClosedError(f"the engine's process ended {ATTEMPTS} times in a row, the last time: {why}")
        logger.error("the engine is given up: %s", error)
        with self._room:
            self._failure = error
        self._end_all(error)

    def _end_all(self, error: EngineClosedError) -> None:
        with self._room:
            deliveries = [self._ledger.fail(entry, error) for entry in list(self._ledger.entries.values())]
            for done, _ in self._tickets.values():
                done.set()
        self._deliver(deliveries)
        self._signal_room()

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Step):
            with self._room:
                for started in message.started:
                    self._ledger.start(started)
                deliveries = [found for event in message.events if (found := self._ledger.take(event)) is not None]
                self._send_new()
            self._deliver(deliveries)
            self._signal_room()
        elif isinstance(message, Answer):
            with self._room:
                done, box = self._tickets.pop(message.ticket, (threading.Event(), []))
                box.append(message.stats)
            done.set()

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            try:
                delivery.run()
            except Exception:  # the caller is gone (a closed event loop): nobody waits for the rest
                self.abort(delivery.work)
