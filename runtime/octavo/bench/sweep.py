"""Tokens a second and latencies against concurrency: what `octavo bench --plot` draws.

At each level so many requests are always under way: when one ends, the next is sent. Every token's time is noted on the
engine's thread, when it is handed over.
"""

from __future__ import annotations

import math
import queue
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from octavo.bench.machine import Limit
from octavo.bench.workloads import VOCABULARY, Job, ids
from octavo.engine.request import TokenEvent
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLM

PROMPT, TOKENS = 128, 64
ROUNDS, LEAST_REQUESTS = 2, 8
"""Requests at a level: so many for each that runs at once, and no fewer than these, or percentiles mean little."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """In seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Level:
    """What was found at one concurrency."""

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    """Of each request."""
    tokens_per_second: float
    limit: float
    time_to_first_token: Percentiles
    """From sending a request to its first token."""
    inter_token_latency: Percentiles
    """Between two tokens of a request."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The same before its limit is known."""

    concurrency: int
    job: Job
    seconds: float
    time_to_first_token: Percentiles
    inter_token_latency: Percentiles

    def beside(self, limit: Limit) -> Level:
        """The level with its limit."""
        least = replace(limit, at_once=self.concurrency).seconds(self.job)
        made = sum(self.job.counts)
        return Level(
            self.concurrency, len(self.job.prompts), len(self.job.prompts[0]), self.job.counts[0], made / self.seconds,
            made / least, self.time_to_first_token, self.inter_token_latency,
        )  # fmt: skip


@dataclass(slots=True)
class _Flight:
    sent: float
    times: list[float] = field(default_factory=list)
    """Of each token."""


def sweep(llm: LLM, *, seconds: float) -> Iterator[Measured]:
    """Levels 1, 2, 4, ... up to the engine's `max_num_seqs`, one at a time, as long as the next is expected to end
    within `seconds` of the start. The first is always measured."""
    began, expected = time.perf_counter(), 0.0
    limits = llm.engine.limits
    prompt = min(PROMPT, limits.max_model_len // 2)
    tokens = min(TOKENS, limits.max_model_len - prompt)
    for concurrency in levels(limits.max_num_seqs):
        requests = max(LEAST_REQUESTS, ROUNDS * concurrency)
        if expected and expected * requests > seconds - (time.perf_counter() - began):
            return
        level = measure_level(llm, concurrency, requests, prompt, tokens)
        expected = level.seconds / requests  # no request gets slower by more than is gained for the others
        yield level


def levels(most: int) -> list[int]:
    """Powers of two below `most`, then `most`."""
    return [2**n for n in range((most - 1).bit_length())] + [most]


def measure_level(llm: LLM, concurrency: int, requests: int, prompt: int, tokens: int) -> Measured:
    """`requests` random prompts, `concurrency` of them at any time."""
    source = random.Random(1000 + concurrency)
    vocabulary = min(VOCABULARY, llm.engine.limits.vocab_size)
    prompts = [ids(source, prompt, vocabulary) for _ in range(requests)]
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=tokens, detokenize=False)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    flights: list[_Flight] = []

    def send(ids: list[int]) -> None:
        flight = _Flight(0.0)

        def sink(event: TokenEvent) -> None:
            flight.times.extend([time.perf_counter()] * len(event.token_ids))
            if event.last:
                ended.put(event.error)

        request = llm.make_request(ids, params, sink).request
        flights.append(flight)
        flight.sent = time.perf_counter()
        llm.engine.service.submit(request)

    began = time.perf_counter()
    for ids_ in prompts[:concurrency]:
        send(ids_)
    for number in range(requests):
        error = ended.get()
        if error is not None:
            raise error
        if concurrency + number < requests:
            send(prompts[concurrency + number])
    seconds = time.perf_counter() - began
    gaps = [after - before for flight in flights for before, after in zip(flight.times, flight.times[1:], strict=False)]
    return Measured(
        concurrency, Job(prompts, [tokens] * requests), seconds,
        percentiles([flight.times[0] - flight.sent for flight in flights]), percentiles(gaps),
    )  # fmt: skip


def percentiles(values: Sequence[float]) -> Percentiles:
    """Between two values, in proportion."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Percentiles(at(0.5), at(0.9), at(0.99))
