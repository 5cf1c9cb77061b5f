"""Runs rows on an engine: scaled to the machine by `octavo bench`, as they are by `benchmarks/gpu.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.bench.limits import share
from octavo.bench.machine import Limit
from octavo.bench.workloads import VOCABULARY, Job, Row, fitted, probe, warm_up
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLM

SCALES = tuple(2.0**-n for n in range(7))
ROW_SECONDS = {"cpu": 12.0, "cuda": 60.0}
"""A row is scaled down until it is expected to take no longer. On a GPU that serves models of 8B, nothing is."""


@dataclass(frozen=True, slots=True)
class Result:
    """A row as it was run."""

    name: str
    label: str
    unit: str
    value: float
    limit: float | None = None
    share: float | None = None
    """Of the limit that was reached, 1 being all of it."""
    scale: float = 1.0
    """Of the full number of requests and of their full lengths."""
    shortened: bool = False
    """To what the engine holds: lengths are below what `scale` says."""
    seconds: float | None = None
    """That measuring it took."""


class Clock:
    """An engine that tells how long a job took."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.vocabulary = min(VOCABULARY, llm.engine.limits.vocab_size)

    def seconds(self, job: Job) -> float:
        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count, detokenize=False) for count in job.counts
        ]
        began = time.perf_counter()
        outputs = self.llm.generate(job.prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        if made != sum(job.counts):
            raise RuntimeError(f"{made} tokens made, {sum(job.counts)} asked for")
        return seconds

    def value(self, row: Row) -> float:
        return row.value(self.seconds, self.vocabulary)

    def warm_up(self) -> None:
        self.seconds(warm_up(self.vocabulary))

    def slowness(self, limit: Limit) -> float:
        """How many times the least time a little job takes: what a row is expected to take beside its own."""
        job = probe(self.vocabulary)
        return self.seconds(job) / limit.seconds(job)


def scale_for(row: Row, expected: Callable[[Job], float], most: float, vocabulary: int, max_len: int) -> float:
    """The largest scale at which all jobs of the row are expected to take at most `most` seconds."""
    for scale in SCALES:
        total = 0.0

        def add(job: Job) -> float:
            nonlocal total
            total += (seconds := expected(job))
            return seconds

        fitted(row.resized(scale, scale), max_len).value(add, vocabulary)
        if total <= most:
            return scale
    return SCALES[-1]


@dataclass(frozen=True, slots=True)
class Timed:
    """A row that has run. `wanted` is what `scale` says, `actual` what the engine holds of it."""

    wanted: Row
    actual: Row
    scale: float
    value: float
    seconds: float


def time_row(clock: Clock, row: Row, *, scale: float = 1.0) -> Timed:
    """Run a row at this scale, shortened where the engine holds less."""
    wanted = row.resized(scale, scale)
    actual = fitted(wanted, clock.llm.engine.limits.max_model_len)
    began = time.perf_counter()
    value = clock.value(actual)
    return Timed(wanted, actual, scale, value, time.perf_counter() - began)


def beside(limit: Limit, row: Timed, vocabulary: int) -> Result:
    """The row with its limit."""
    actual, least = row.actual, row.actual.value(limit.seconds, vocabulary)
    return Result(
        actual.name, actual.label, actual.unit, row.value, least, share(row.value, least, actual.unit), row.scale,
        actual != row.wanted, row.seconds,
    )  # fmt: skip
