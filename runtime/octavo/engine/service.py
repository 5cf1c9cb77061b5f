"""The thread that owns an engine (a `Core`). All callers, sync and async, talk to it through an `EngineService`.

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
from typing import Any, TypeVar

from octavo.engine.contract import Core, Work
from octavo.engine.contract import EngineStats as EngineStats
from octavo.errors import EngineClosedError, ForkedEngineError, QueueFullError
from octavo.host_memory import give_back_memory, memory_goes_back

logger = logging.getLogger("octavo")

_Command = Callable[[], None]
T = TypeVar("T")


class EngineService:
    """Runs an engine in a daemon thread. `make_core` is called on that thread; its error is raised by `start`."""

    def __init__(self, make_core: Callable[[], Core], *, max_queued_requests: int) -> None:
        self._make_core = make_core
        self._core: Core | None = None
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._open: dict[str, Work] = {}
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

    def submit(self, request: Work, *, wait: bool = False) -> None:
        """See `Service`."""
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
        """See `Service`."""
        with self._room:
            if self._backlog() >= self._max_queued and not self.closed:
                self._room_callbacks.append(callback)
                return
        callback()

    def abort(self, request: Work, index: int | None = None) -> None:
        """See `Service`."""
        if os.getpid() == self._pid and not self._closing:
            self._commands.put(lambda: self._abort(request, index))

    def call(self, function: Callable[[Any], T]) -> T:
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
        """See `Service`."""
        stats: EngineStats = self.call(lambda core: core.stats())
        return stats

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

    def wait(self) -> BaseException | None:
        """Until the thread has ended. What ended it, unless that was `close`."""
        self._thread.join()
        return self._failure

    def check_process(self) -> None:
        """See `Service`."""
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

    def _loop(self, core: Core) -> None:
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
        return self._not_accepted + (self._core.backlog if self._core else 0)

    def _accept(self, request: Work) -> None:
        assert self._core is not None
        self._open[request.request_id] = request
        with self._room:  # or the request would count twice for a moment
            self._core.add(request)
            self._not_accepted -= 1

    def _abort(self, request: Work, index: int | None) -> None:
        assert self._core is not None
        if request.request_id in self._open:
            self._core.abort(request, index)

    def _deliver(self, request: Work, sink: Callable[[Any], None], event: Any) -> None:
        if request.finished:
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
            error = EngineClosedError("the engine was closed before this request ended")
            error.__cause__ = cause
            try:
                request.fail(error)
            except Exception:
                logger.debug("a caller went away before its request ended", exc_info=True)
        self._open.clear()
