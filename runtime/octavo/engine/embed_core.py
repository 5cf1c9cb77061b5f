"""The engine of an embedding model: waiting texts of all callers become batches, one forward pass a step. Owned by the
same thread as the engine that makes text (`service.py`). Knows no torch.

A batch is padded to its longest text, so texts of like length go together, up to `BatchLimits.tokens` with the
padding. The text that waits longest is in each batch, so none waits for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from octavo.engine.contract import EngineStats
from octavo.engine.embed_request import EmbedEvent, EmbedRequest, Vector
from octavo.errors import DeviceLostError, RequestFailedError

WINDOW = 1024
"""So many texts, those that came first, are sorted by length for a step."""


class Encoder(Protocol):
    """What the loop needs from `execute.encoder.EncoderRunner`."""

    def encode(self, texts: Sequence[Sequence[int]]) -> Sequence[Vector | None]:
        """One vector for each text's token ids, in their order; None where the model's output is not finite."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Of one step."""

    tokens: int
    """With padding. A longer text has a step of its own."""
    texts: int


class EmbedCore:
    """`turns`, `is_lost`: see `EngineCore`."""

    def __init__(
        self, encoder: Encoder, limits: BatchLimits, *,
        turns: AbstractContextManager[None] = nullcontext(),  # noqa: B008 (it has no state)
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.encoder, self.limits, self._turns, self._is_lost = encoder, limits, turns, is_lost
        self.steps = 0
        self.largest_batch = 0
        self._waiting: dict[str, EmbedRequest] = {}
        """By id, in the order of arrival."""
        self._alone: deque[EmbedRequest] = deque()
        """Of a batch that failed: each has a step of its own, which tells whose fault it was."""

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._alone

    @property
    def backlog(self) -> int:
        return len(self._waiting)

    def add(self, request: EmbedRequest) -> None:
        self._waiting[request.request_id] = request

    def abort(self, request: EmbedRequest, index: int | None) -> None:
        """Nothing of it has run, as a step ends before the next command is taken."""
        self._waiting.pop(request.request_id, None)
        if request in self._alone:
            self._alone.remove(request)
        request.end(EmbedEvent())

    def stats(self) -> EngineStats:
        return EngineStats(
            running=0, waiting=len(self._waiting) + len(self._alone), blocks_total=0, blocks_used=0, blocks_cached=0,
            blocks_free=0, preemptions=0, steps=self.steps, largest_batch=self.largest_batch,
        )  # fmt: skip

    def step(self) -> None:
        batch = self._next_batch()
        now = time.monotonic()
        for request in batch:
            request.metrics.queue_time = now - request.metrics.arrival
        try:
            with self._turns:
                vectors = self.encoder.encode([request.prompt_ids for request in batch])
        except Exception as error:
            self._blame(batch, error)
            return
        self.steps += 1
        self.largest_batch = max(self.largest_batch, len(batch))
        for request, vector in zip(batch, vectors, strict=True):
            if vector is None:
                request.fail(RequestFailedError("the model's output for this text is not finite"))
            else:
                request.end(EmbedEvent(vector))

    def _next_batch(self) -> list[EmbedRequest]:
        if self._alone:
            return [self._alone.popleft()]
        oldest = next(iter(self._waiting.values()))
        window = sorted(islice(self._waiting.values(), WINDOW), key=lambda request: -len(request.prompt_ids))
        for batch in self._runs(window):
            if oldest in batch:
                break
        for request in batch:
            del self._waiting[request.request_id]
        return batch

    def _runs(self, window: list[EmbedRequest]) -> list[list[EmbedRequest]]:
        """`window`, longest first, cut into batches."""
        runs: list[list[EmbedRequest]] = []
        start = 0
        while start < len(window):
            longest = max(len(window[start].prompt_ids), 1)
            count = max(min(self.limits.tokens // longest, self.limits.texts), 1)
            runs.append(window[start : start + count])
            start += count
        return runs

    def _blame(self, batch: list[EmbedRequest], error: Exception) -> None:
        """The step failed as a whole. One text: it is the reason. Several: each runs alone next, and fails alone."""
        if self._is_lost():
            raise DeviceLostError(f"the device is lost: {type(error).__name__}: {error}") from error
        if len(batch) > 1:
            self._alone.extend(batch)
            return
        failure = RequestFailedError(f"the model failed on this text: {type(error).__name__}: {error}")
        failure.__cause__ = error
        batch[0].end(EmbedEvent(error=failure))
