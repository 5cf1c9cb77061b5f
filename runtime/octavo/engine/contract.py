"""What the parts around an engine expect of each other: the thread that owns it (`service.py`) of the engine and of the
requests that callers hand over, and callers of that thread, or of the process (`child/service.py`), that they hand them
to. An engine that makes text (`core.py`) and one that makes embeddings (`embed_core.py`) keep to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from octavo.structured_outputs import StructuredOutputsParams


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, taken between two steps. Blocks: free + cached + used = total; an engine of embeddings has none."""

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
    blocks_peak: int = 0
    """Most blocks that were used in one step."""

    def _repr_html_(self) -> str:
        from octavo.html import stats_html

        return stats_html(self)


class Work(Protocol):
    """A request. `sink` takes its events, on the engine's thread."""

    request_id: str
    sink: Callable[[Any], None]

    @property
    def finished(self) -> bool:
        """Its last event is sent, or is the one that is being sent."""

    def fail(self, error: BaseException) -> None:
        """End all of it that has not ended, with `error` as the last event."""


class Core(Protocol):
    """An engine. Only its thread calls it."""

    @property
    def idle(self) -> bool:
        """There is nothing to do for a step."""

    @property
    def backlog(self) -> int:
        """Requests that wait for their very first step: what the bound of the queue counts."""

    def add(self, request: Any) -> None: ...

    def abort(self, request: Any, index: int | None) -> None:
        """End a request that was added, or one of its sequences; its last event is sent at once."""

    def step(self) -> None:
        """Advance what runs. An error of one request is that request's last event; what is raised ends the engine."""

    def stats(self) -> EngineStats: ...


class Compiled(Protocol):
    """A grammar. `start`: what a request is constrained by, for one output."""

    def start(self) -> Any: ...


class Compiler(Protocol):
    """What callers ask for grammars."""

    def known(self, params: StructuredOutputsParams) -> bool:
        """`compile` will not take time."""

    def compile(self, params: StructuredOutputsParams) -> Compiled:
        """Blocks. Raises `RequestError` with the field "structured_outputs"."""


class Service(Protocol):
    """What callers talk to, from any thread: a running engine, wherever it runs."""

    def submit(self, request: Any, *, wait: bool = False) -> None:
        """Hand a request over. Raises `QueueFullError` if too many wait already, unless `wait`: then blocks for
        room."""

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, soon after there may be room in the queue: for callers that must not block. It is
        called on any thread and must not raise; who is called looks for itself by another `submit`."""

    def abort(self, request: Any, index: int | None = None) -> None:
        """End a request, or one of its sequences, soon. Does nothing if it has ended; never raises, never blocks."""

    def stats(self) -> EngineStats:
        """Counts of this moment; waits for the current step."""

    @property
    def closed(self) -> bool:
        """It takes no requests any more: it was closed, or has failed."""

    def close(self) -> None:
        """End every request with `EngineClosedError`, let go of model and cache. Safe to call twice."""

    def check_process(self) -> None:
        """Raises `ForkedEngineError` in a forked child: waiting for anything there would be for ever."""
