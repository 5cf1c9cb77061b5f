"""In the engine's process: what its steps bring, on the way to the server. One message a step carries the tokens of all
requests: on a small model a message each would cost more than the step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from octavo.engine.child.messages import Beam, Event, Problem, Started, Step
from octavo.engine.contract import Core, EngineStats
from octavo.engine.embed_request import EmbedEvent
from octavo.engine.request import BeamEvent, Request, TokenEvent
from octavo.errors import EngineClosedError
from octavo.outputs import RequestMetrics


class Outbox:
    """Collects events, from any thread; `flush` hands them to `send`."""

    def __init__(self, send: Callable[[Step], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._fresh: dict[int, RequestMetrics] = {}
        """Requests whose first step is still to be planned, or was planned and not told."""

    def accepted(self, number: int, metrics: RequestMetrics) -> None:
        """The engine has got a request."""
        with self._lock:
            self._fresh[number] = metrics

    def put_token(self, number: int, request: Request, event: TokenEvent) -> None:
        """An event of a request that makes text."""
        if isinstance(event.error, EngineClosedError):
            return  # this process ends: what becomes of its requests is decided by who replaces it
        self._put(Event(
            number, event.index, event.token_ids, event.finish_reason, event.stop_reason, event.logprobs,
            event.prompt_logprobs, None if event.error is None else Problem.of(event.error),
            Beam(event.cumulative_logprob, event.score) if isinstance(event, BeamEvent) else None,
            request.metrics.preemptions,
        ))  # fmt: skip

    def put_vector(self, number: int, event: EmbedEvent) -> None:
        """The event of a text that is embedded."""
        if isinstance(event.error, EngineClosedError):
            return
        self._put(Event(
            number, finish_reason="stop", error=None if event.error is None else Problem.of(event.error),
            vector=None if event.vector is None else event.vector.tolist(),
        ))  # fmt: skip

    def _put(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def flush(self) -> None:
        """Send what has come together."""
        with self._lock:
            started = [
                Started(number, metrics.queue_time, metrics.cached_tokens)
                for number, metrics in self._fresh.items()
                if metrics.queue_time is not None
            ]
            for one in started:
                del self._fresh[one.number]
            events, self._events = self._events, []
            for event in events:  # it may have ended without a step
                if event.finish_reason is not None or event.error is not None:
                    self._fresh.pop(event.number, None)
        if started or events:
            self._send(Step(started, events))


class ReportingCore:
    """Around the engine's core: after each step, and after each abort, what it brought is sent."""

    def __init__(self, core: Core, outbox: Outbox) -> None:
        self._core, self._outbox = core, outbox
        self._step_began: float | None = None

    @property
    def step_seconds(self) -> float:
        """For how long the step takes that runs now; 0 if none does. Any thread."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def idle(self) -> bool:
        return self._core.idle

    @property
    def backlog(self) -> int:
        return self._core.backlog

    def add(self, request: Any) -> None:
        self._core.add(request)

    def abort(self, request: Any, index: int | None) -> None:
        self._core.abort(request, index)
        self._outbox.flush()

    def step(self) -> None:
        self._step_began = time.monotonic()
        try:
            self._core.step()
        finally:
            self._step_began = None
        self._outbox.flush()

    def stats(self) -> EngineStats:
        return self._core.stats()
