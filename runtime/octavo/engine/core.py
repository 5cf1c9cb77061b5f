"""The engine's loop: plan, launch, commit. Owned by one thread (`service.py`), which calls `step` while there is work.

`depth` steps may be under way before the oldest is waited for: 0 on the CPU, 1 on a GPU, where the host then plans step
n+1 while the device runs step n. It is the same loop in both cases.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Protocol

from octavo.engine.contract import EngineStats
from octavo.engine.draft import Draft
from octavo.engine.plan import Masks, StepPlan
from octavo.engine.request import Request, TokenEvent
from octavo.engine.scheduler import Scheduler
from octavo.errors import DeviceLostError, RequestFailedError

if TYPE_CHECKING:
    import numpy as np


class Launched(Protocol):
    """A step under way. `wait` gives one event (or None) for each entry of the plan's `steps`."""

    def wait(self) -> list[TokenEvent | None]: ...


class StepRunner(Protocol):
    """What the loop needs from `execute.runner.Runner`."""

    def launch(self, plan: StepPlan, masks: Masks) -> Launched: ...


class _EarlierStepFailed(Exception):
    """A step under construction began with tokens that do not exist."""


class EngineCore:
    """`turns`: is held while a step is launched, where engines share what they run on (`turns.py`). `is_lost`: the
    device cannot go on after an error; no request is to blame then, and the loop ends."""

    def __init__(
        self, scheduler: Scheduler, runner: StepRunner, *, depth: int,
        turns: AbstractContextManager[None] = nullcontext(),  # noqa: B008 (it has no state)
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.scheduler, self.runner, self.depth, self._turns = scheduler, runner, depth, turns
        self._is_lost = is_lost
        self.steps = self.largest_batch = self.blocks_peak = 0
        self._failures = 0
        self._under_way: deque[tuple[Draft, Launched]] = deque()

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and not self._under_way

    @property
    def backlog(self) -> int:
        return self.scheduler.fresh

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def abort(self, request: Request, index: int | None) -> None:
        self.scheduler.abort(request, index)

    def stats(self) -> EngineStats:
        scheduler, pool = self.scheduler, self.scheduler.pool
        return EngineStats(
            running=len(scheduler.running), waiting=len(scheduler.waiting), blocks_total=pool.capacity,
            blocks_used=pool.used, blocks_cached=pool.cached, blocks_free=pool.available - pool.cached,
            preemptions=scheduler.preemptions, steps=self.steps, largest_batch=self.largest_batch,
            blocks_peak=self.blocks_peak,
        )  # fmt: skip

    def step(self) -> None:
        """Launch the next step if there is one, then take in results until at most `depth` steps are under way."""
        draft = self.scheduler.plan()
        if draft is not None:
            self._launch(draft)
        keep = self.depth if draft is not None and draft.overlaps else 0
        while len(self._under_way) > keep:
            self._commit_oldest()

    def _launch(self, draft: Draft) -> None:
        failures = self._failures
        try:
            with self._turns:
                launched = self.runner.launch(draft.plan(), lambda: self._masks(draft))
        except Exception as error:
            self._drain()
            if self._failures == failures:
                self._blame(draft, error)
            else:  # an earlier step failed, and this one perhaps for no other reason: it runs again
                self.scheduler.rollback(draft)
        else:
            self._under_way.append((draft, launched))
            self.steps += 1
            self.largest_batch = max(self.largest_batch, len(draft.parts))
            self.blocks_peak = max(self.blocks_peak, self.scheduler.pool.used)
            self.scheduler.launched(draft)

    def _masks(self, draft: Draft) -> list[np.ndarray | None]:
        """Asked for while a step is launched. A grammar's next tokens depend on those of the steps under way."""
        failures = self._failures
        self._drain()
        if self._failures != failures:
            raise _EarlierStepFailed
        return self.scheduler.masks(draft)

    def _drain(self) -> None:
        while self._under_way:
            self._commit_oldest()

    def _commit_oldest(self) -> None:
        draft, launched = self._under_way.popleft()
        try:
            events = launched.wait()
        except Exception as error:
            self._discard_later_steps()
            self._blame(draft, error)
        else:
            self.scheduler.commit(draft, events)

    def _discard_later_steps(self) -> None:
        """Steps launched on top of a failed one worked with tokens that do not exist."""
        while self._under_way:
            draft, launched = self._under_way.pop()
            with suppress(Exception):
                launched.wait()
            self.scheduler.rollback(draft)

    def _blame(self, draft: Draft, error: Exception) -> None:
        """The step failed as a whole. One sequence: it is the reason. Several: each runs alone next, and fails
        alone."""
        if self._is_lost():
            raise DeviceLostError(f"the device is lost: {type(error).__name__}: {error}") from error
        self._failures += 1
        if len(draft.parts) > 1:
            self.scheduler.isolate(draft)
            return
        for sequence in self.scheduler.rollback(draft):
            failure = RequestFailedError(f"the model failed on this request: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self.scheduler.fail(sequence, failure)
