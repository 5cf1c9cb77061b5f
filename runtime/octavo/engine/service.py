"""The thread that owns an `EngineCore`. All callers, sync and async, talk to the engine through an `EngineService`.

Callers put commands into one queue; the thread takes them in between two steps, runs steps while there is work and
sleeps when there is none. Results leave through each request's own sink. After `close()`, or if the loop itself breaks,
every open request gets an `EngineClosedError`: nobody waits for ever.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from octavo.engine.core import EngineCore
from octavo.engine.request import Request, Sink, TokenEvent
from octavo.errors import EngineClosedError, ForkedEngineError, QueueFullError
from octavo.host_memory import give_back_memory, memory_goes_back

logger = logging.getLogger("octavo")

_Command = Callable[[], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, taken between two steps. Blocks: free + cached + used = total."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    preemptions: int
    steps: int
    largest_batch: int
    """Most sequences that one step advanced, since the engine started."""

    def _repr_html_(self) -> str:
        from octavo.html import stats_html

        return stats_html(self)


class EngineService:
    """Runs an engine in a daemon thread. `make_core` is called on that thread; its error is raised by `start`."""

    def __init__(self, make_core: Callable[[], EngineCore], *, max_queued_requests: int) -> None:
        self._make_core = make_core
        self._core: EngineCore | None = None
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._open: dict[str, Request] = {}
        self._room = threading.Condition()
        self._room_callbacks: list[Callable[[], None]] = []
        self._not_accepted = 0  # submitted, and still in the command queue
        self._max_queued = max_queued_requests
        self._closing = False
        self._failure: BaseException | None = None
        self._pid = os.getpid()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until the engine is ready. Raises what `make_core` raised."""
        self._thread.start()
        self._ready.wait()
        if self._core is None and self._failure is not None:
            self._thread.join()
            raise self._failure

    # ---------------------------------------------------------------- callers' side, any thread

    def submit(self, request: Request, *, wait: bool = False) -> None:
        """Hand a request over. Raises `QueueFullError` if too many wait already, unless `wait`: then blocks for
        room."""
        self._check_usable()  # before the lock: in a forked child it may be locked for ever
        deliver, request.sink = request.sink, lambda event: self._deliver(request, deliver, event)
        # the check and the hand-over are one: nothing enters the queue after it was emptied at the end
        with self._room:
            self._check_usable()
            while self._backlog() >= self._max_queued:
                if not wait:
                    raise QueueFullError(
                        f"{self._max_queued} requests wait already: try again later, or raise max_queued_requests"
                    )
                self._room.wait()
                self._check_usable()
            self._not_accepted += 1
            self._commands.put(lambda: self._accept(request))

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, soon after there may be room in the queue: for callers that must not block. It is
        called on any thread and must not raise; who is called looks for itself by another `submit`."""
        with self._room:
            if self._backlog() >= self._max_queued and not self.closed:
                self._room_callbacks.append(callback)
                return
        callback()

    def abort(self, request: Request, index: int | None = None) -> None:
        """End a request, or one of its sequences, soon. Does nothing if it has ended; never raises, never blocks."""
        if os.getpid() == self._pid and not self._closing:
            self._commands.put(lambda: self._abort(request, index))

    def call(self, function: Callable[[EngineCore], T]) -> T:
        """Run `function(core)` on the engine's thread between two steps, and return its result."""
        self._check_usable()
        done = threading.Event()
        box: list[T] = []
        errors: list[BaseException] = []

        def command() -> None:
            try:
                assert self._core is not None
                box.append(function(self._core))
            except BaseException as error:
                errors.append(error)
            done.set()

        self._commands.put(command)
        while not done.wait(timeout=0.5):
            if not self._thread.is_alive():
                raise EngineClosedError("the engine was closed")
        if errors:
            raise errors[0]
        return box[0]

    def stats(self) -> EngineStats:
        """Counts of this moment; waits for the current step."""

        def read(core: EngineCore) -> EngineStats:
            scheduler, pool = core.scheduler, core.scheduler.pool
            return EngineStats(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                blocks_total=pool.capacity,
                blocks_used=pool.used,
                blocks_cached=pool.cached,
                blocks_free=pool.available - pool.cached,
                preemptions=scheduler.preemptions,
                steps=core.steps,
                largest_batch=core.largest_batch,
            )

        return self.call(read)

    @property
    def closed(self) -> bool:
        return self._closing or self._failure is not None

    def close(self) -> None:
        """End every request with `EngineClosedError`, stop the thread, let go of model and cache. Safe to call
        twice."""
        if os.getpid() != self._pid:
            return  # a forked child has no such thread to stop
        with self._room:
            self._closing = True
        self._signal_room()
        self._commands.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def check_process(self) -> None:
        """Raises `ForkedEngineError` in a forked child: waiting for anything there would be for ever."""
        if os.getpid() != self._pid:
            raise ForkedEngineError(
                "this engine belongs to the parent process: its thread does not exist after a fork. "
                "Make a new LLM in the child, or start children with multiprocessing's 'spawn'"
            )

    def _check_usable(self) -> None:
        self.check_process()
        if self._failure is not None:
            raise EngineClosedError(f"the engine stopped: {self._failure}") from self._failure
        if self._closing:
            raise EngineClosedError("the engine was closed: make a new LLM")

    # ---------------------------------------------------------------- engine's side, its thread only

    def _run(self) -> None:
        try:
            self._core = self._make_core()
        except BaseException as error:
            self._failure = error
            # or what was made so far would live as long as the error, which its caller may keep
            traceback.clear_frames(error.__traceback__)
            give_back_memory()
            return
        finally:
            self._ready.set()
        try:
            self._loop(self._core)
        except BaseException as error:
            logger.exception("the engine's loop failed")
            self._failure = error
        finally:
            self._end_all()
            with memory_goes_back():
                self._core = None
            give_back_memory()

    def _loop(self, core: EngineCore) -> None:
        while True:
            while core.idle or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command()
                self._signal_room()  # an abort makes room too
            core.step()
            self._signal_room()

    def _signal_room(self) -> None:
        """Wake the callers that wait for room: each looks for itself whether there is some now."""
        with self._room:
            self._room.notify_all()
            if not self._room_callbacks or (self._backlog() >= self._max_queued and not self.closed):
                return
            callbacks, self._room_callbacks = self._room_callbacks, []
        for callback in callbacks:
            callback()

    def _backlog(self) -> int:
        return self._not_accepted + (self._core.scheduler.fresh if self._core else 0)

    def _accept(self, request: Request) -> None:
        assert self._core is not None
        self._open[request.request_id] = request
        with self._room:  # or the request would count twice for a moment
            self._core.scheduler.add(request)
            self._not_accepted -= 1

    def _abort(self, request: Request, index: int | None) -> None:
        assert self._core is not None
        if request.request_id in self._open:
            self._core.scheduler.abort(request, index)

    def _deliver(self, request: Request, sink: Sink, event: TokenEvent) -> None:
        if event.last and all(sequence.finished for sequence in request.sequences):
            self._open.pop(request.request_id, None)
        try:
            sink(event)
        except Exception:
            self._open.pop(request.request_id, None)
            raise

    def _end_all(self) -> None:
        cause = self._failure
        with self._room:
            self._closing = True
        self._signal_room()
        while not self._commands.empty():  # requests handed over but not yet accepted must end too
            command = self._commands.get()
            if command is not None:
                try:
                    command()
                except Exception:  # the scheduler may be in any state after a failure; the others must end all the same
                    logger.debug("a command failed while the engine ended", exc_info=True)
        for request in list(self._open.values()):
            for sequence in request.sequences:
                if not sequence.finished:
                    error = EngineClosedError("the engine was closed before this request ended")
                    error.__cause__ = cause
                    sequence.finished = True
                    try:
                        request.sink(TokenEvent(sequence.index, error=error))
                    except Exception:
                        logger.debug("a caller went away before its request ended", exc_info=True)
        self._open.clear()
