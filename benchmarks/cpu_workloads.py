"""What `cpu.py` asks of every engine: four workloads, the same in every process. Imports no engine.

Prompts are random token ids, so that no engine gains by guessing, and outputs have a fixed length with end-of-sequence
ignored, so that all make exactly the same number of tokens. No prompt comes twice: a cache of prefixes helps only in
W4, whose requests share one on purpose.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

VOCABULARY = 40000
PROMPT, ANSWER = 1024, 128
SHARED, OWN, ASKERS = 512, 32, 32
REPEATS = 3
NAMES = {
    "W3": "64 requests at once, tokens/s",
    "W1": "one stream, tokens/s",
    "W2": "prompt of 1024, tokens/s",
    "W4": "32 with one prefix of 512, s",
    "ready": "start to first token, s",
    "memory": "peak memory of W3, MB",
}
SMALLER = {"W4", "ready", "memory"}
"""Rows where less is better."""


class Engine(Protocol):
    """What a workload needs of an engine."""

    prefix_cache: bool
    """A later call of `generate` reuses what an earlier one computed."""

    def generate(self, prompts: list[list[int]], counts: list[int], shared: int = 0) -> int:
        """Answer all prompts, submitted together, with exactly `counts` tokens each; how many tokens were made.

        The first `shared` tokens are the same in all prompts.
        """


def ids(source: random.Random, count: int) -> list[int]:
    return [source.randrange(100, VOCABULARY) for _ in range(count)]


def workload(count: int) -> list[tuple[list[int], int]]:
    """(prompt ids, output tokens) of each request of W3; the same in every process."""
    source = random.Random(0)
    return [(ids(source, source.randint(16, 256)), source.randint(16, 128)) for _ in range(count)]


def timed(engine: Engine, prompts: list[list[int]], counts: list[int], shared: int = 0) -> float:
    began = time.perf_counter()
    made = engine.generate(prompts, counts, shared)
    seconds = time.perf_counter() - began
    if made != sum(counts):
        raise RuntimeError(f"{made} tokens made, {sum(counts)} asked for")
    return seconds


def warm_up(engine: Engine) -> None:
    """The first steps of a process are slower: code and caches are cold."""
    source = random.Random(7)
    engine.generate([ids(source, length) for length in (16, 24, 64, 200)], [4, 8, 4, 4])


def one_stream(engine: Engine, requests: int) -> dict[str, Any]:
    source = random.Random(1)
    rates = []
    timed(engine, [ids(source, 32)], [8])
    for _ in range(REPEATS):
        first = timed(engine, [ids(source, 32)], [1])
        whole = timed(engine, [ids(source, 32)], [ANSWER])
        rates.append((ANSWER - 1) / (whole - first))
    return {"value": statistics.median(rates), "all": rates}


def one_prompt(engine: Engine, requests: int) -> dict[str, Any]:
    source = random.Random(2)
    timed(engine, [ids(source, PROMPT)], [1])
    rates = [PROMPT / timed(engine, [ids(source, PROMPT)], [1]) for _ in range(REPEATS)]
    return {"value": statistics.median(rates), "all": rates}


def many(engine: Engine, requests: int) -> dict[str, Any]:
    work = workload(requests)
    seconds = timed(engine, [prompt for prompt, _ in work], [count for _, count in work])
    return {"value": sum(count for _, count in work) / seconds, "seconds": seconds}


def one_prefix(engine: Engine, requests: int) -> dict[str, Any]:
    """All at once, and one first whose prefix the others find: the better counts, each with a prefix never seen."""
    source = random.Random(4)
    counts = [OWN] * ASKERS

    def prompts() -> list[list[int]]:
        prefix = ids(source, SHARED)
        return [prefix + ids(source, OWN) for _ in range(ASKERS)]

    found = {"all at once": timed(engine, prompts(), counts, SHARED)}
    if engine.prefix_cache:
        asked = prompts()
        first = timed(engine, asked[:1], counts[:1], SHARED)
        found["one first"] = first + timed(engine, asked[1:], counts[1:], SHARED)
    return {"value": min(found.values()), **found}


RUN: dict[str, Callable[[Engine, int], dict[str, Any]]] = {
    "W3": many,
    "W1": one_stream,
    "W2": one_prompt,
    "W4": one_prefix,
}
"""In the order in which they run: memory is read after W3, before the others add to it."""


def limits(rate: Callable[[int], float], requests: int) -> dict[str, float]:
    """The most that a machine allows, of `rate(rows)`: tokens/s of steps of so many rows.

    Weights are read once a step and multiplied with every token; attention and all else cost nothing here.
    """
    work = workload(requests)
    longest = max(count for _, count in work)
    steps = [sum(count > step for _, count in work) for step in range(1, longest)]
    seconds = sum(len(prompt) for prompt, _ in work) / rate(PROMPT) + sum(rows / rate(rows) for rows in steps)
    return {
        "W1": rate(1),
        "W2": rate(PROMPT),
        "W3": sum(count for _, count in work) / seconds,
        "W4": (SHARED + ASKERS * OWN) / rate(PROMPT) + (OWN - 1) * ASKERS / rate(ASKERS),
    }


def better(name: str, values: Sequence[float]) -> float:
    return min(values) if name in SMALLER else max(values)
