"""The rows that are measured: which requests a row sends and what its figure means. Imports no engine.

Prompts are random token ids from fixed seeds, temperature is 0.6 and end-of-sequence is ignored, so that every engine
makes the same tokens in number. No prompt comes twice, but for the common part in `prefix`. The rows, at full size:

    ready              from constructing the LLM to the return of the constructor
    one_stream         prompt of 128: (time for 257 tokens - time for 1) / 256, median of 3
    first_128, _8000   time of a request for 1 token, nothing else running, prompt never seen: median of 5 and 3
    batch_64           64 prompts of 128 tokens, 128 tokens out, all at once: output tokens / time, median of 3
    prefix             128 prompts that share 2048 tokens, 64 of their own, 64 out; nothing cached: time
    batch              256 requests, prompts and outputs of 100 to 1024 tokens, all at once: output tokens / time

A row's figure is made from the seconds of its jobs by `Row.value`, which asks a function for them. Given a clock and an
engine that is a measurement; given the model of `limits` it is the limit of the same row, and given an estimate it says
how long the row will take. So there is one definition for the three.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

VOCABULARY = 100_000
"""Token ids lie below it, or below the vocabulary of a model that has fewer."""
READY = "ready"
SMALLEST = 8
"""No length is scaled below this one."""


@dataclass(frozen=True, slots=True)
class Job:
    """Requests that are handed over together. The first `shared` tokens of all prompts are the same."""

    prompts: list[list[int]]
    counts: list[int]
    """Tokens to make for each prompt."""
    shared: int = 0


Seconds = Callable[[Job], float]
"""How long a job takes, or took."""


class Row(Protocol):
    """One figure and the requests behind it."""

    @property
    def name(self) -> str:
        """What it is asked for by."""

    @property
    def unit(self) -> str:
        """ "tokens/s", of which more is better, or a time, of which less is."""

    @property
    def label(self) -> str:
        """For a table: what was run."""

    @property
    def longest(self) -> int:
        """Tokens of its longest request, prompt and output."""

    def value(self, seconds: Seconds, vocabulary: int) -> float:
        """The figure in `unit`, from the seconds of its jobs."""

    def resized(self, requests: float, lengths: float) -> Self:
        """The same row with the number of its requests and their lengths multiplied."""


def ids(source: random.Random, count: int, vocabulary: int) -> list[int]:
    return [source.randrange(vocabulary) for _ in range(count)]


def _part(size: int, factor: float, least: int = SMALLEST) -> int:
    return max(min(size, least), int(size * factor))


@dataclass(frozen=True)
class OneStream:
    prompt: int = 128
    tokens: int = 257
    repeats: int = 3
    name: str = "one_stream"
    unit: str = "ms per token"

    @property
    def label(self) -> str:
        return f"one stream, {self.prompt} in, {self.tokens} out"

    @property
    def longest(self) -> int:
        return self.prompt + self.tokens

    def value(self, seconds: Seconds, vocabulary: int) -> float:
        def once(seed: int, count: int) -> float:
            return seconds(Job([ids(random.Random(seed), self.prompt, vocabulary)], [count]))

        found = ((once(40 + n, self.tokens) - once(30 + n, 1)) / (self.tokens - 1) for n in range(self.repeats))
        return statistics.median(found) * 1e3

    def resized(self, requests: float, lengths: float) -> Self:
        return replace(self, prompt=_part(self.prompt, lengths), tokens=1 + _part(self.tokens - 1, lengths))


@dataclass(frozen=True)
class FirstToken:
    prompt: int
    repeats: int
    name: str
    unit: str = "ms"

    @property
    def label(self) -> str:
        return f"first token of {self.prompt}"

    @property
    def longest(self) -> int:
        return self.prompt + 1

    def value(self, seconds: Seconds, vocabulary: int) -> float:
        # a seed of its own for each length: or the longer prompts would begin with the shorter ones, which are cached
        seeds = (50000 + self.prompt + n for n in range(self.repeats))
        prompts = [ids(random.Random(seed), self.prompt, vocabulary) for seed in seeds]
        return statistics.median(seconds(Job([prompt], [1])) for prompt in prompts) * 1e3

    def resized(self, requests: float, lengths: float) -> Self:
        return replace(self, prompt=_part(self.prompt, lengths))


@dataclass(frozen=True)
class Alike:
    """Requests of one size."""

    requests: int = 64
    prompt: int = 128
    tokens: int = 128
    repeats: int = 3
    name: str = "batch_64"
    unit: str = "tokens/s"

    @property
    def label(self) -> str:
        return f"{self.requests} requests, {self.prompt} in, {self.tokens} out"

    @property
    def longest(self) -> int:
        return self.prompt + self.tokens

    def value(self, seconds: Seconds, vocabulary: int) -> float:
        def once(seed: int) -> float:
            source = random.Random(seed)
            prompts = [ids(source, self.prompt, vocabulary) for _ in range(self.requests)]
            return self.requests * self.tokens / seconds(Job(prompts, [self.tokens] * self.requests))

        return statistics.median(once(70 + n) for n in range(self.repeats))

    def resized(self, requests: float, lengths: float) -> Self:
        return replace(
            self, requests=_part(self.requests, requests), prompt=_part(self.prompt, lengths),
            tokens=_part(self.tokens, lengths),
        )  # fmt: skip


@dataclass(frozen=True)
class SharedPrefix:
    requests: int = 128
    shared: int = 2048
    own: int = 64
    tokens: int = 64
    name: str = "prefix"
    unit: str = "s"

    @property
    def label(self) -> str:
        return f"{self.requests} sharing {self.shared}, {self.own} of their own, {self.tokens} out"

    @property
    def longest(self) -> int:
        return self.shared + self.own + self.tokens

    def value(self, seconds: Seconds, vocabulary: int) -> float:
        source = random.Random(80)
        common = ids(source, self.shared, vocabulary)
        prompts = [common + ids(source, self.own, vocabulary) for _ in range(self.requests)]
        return seconds(Job(prompts, [self.tokens] * self.requests, self.shared))

    def resized(self, requests: float, lengths: float) -> Self:
        return replace(
            self, requests=_part(self.requests, requests), shared=_part(self.shared, lengths),
            own=_part(self.own, lengths), tokens=_part(self.tokens, lengths),
        )  # fmt: skip


@dataclass(frozen=True)
class Mixed:
    """Requests whose prompts and outputs have lengths drawn from a range."""

    requests: int = 256
    low: int = 100
    high: int = 1024
    name: str = "batch"
    unit: str = "tokens/s"

    @property
    def label(self) -> str:
        return f"{self.requests} requests, {self.low} to {self.high} in and out"

    @property
    def longest(self) -> int:
        return 2 * self.high

    def value(self, seconds: Seconds, vocabulary: int) -> float:
        source = random.Random(10)
        prompts = [ids(source, source.randint(self.low, self.high), vocabulary) for _ in range(self.requests)]
        counts = [source.randint(self.low, self.high) for _ in range(self.requests)]
        return sum(counts) / seconds(Job(prompts, counts))

    def resized(self, requests: float, lengths: float) -> Self:
        return replace(
            self, requests=_part(self.requests, requests), low=_part(self.low, lengths),
            high=_part(self.high, lengths),
        )  # fmt: skip


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        OneStream(),
        FirstToken(128, 5, "first_128"),
        FirstToken(8000, 3, "first_8000"),
        Alike(),
        SharedPrefix(),
        Mixed(),
    )
}
"""At full size, in the order in which they run."""
NAMES = (READY, *ROWS)


def fitted(row: Row, max_len: int) -> Row:
    """`row` with all lengths shortened alike until its longest request fits into `max_len` tokens.

    Raises `ValueError` where even the shortest do not."""
    while row.longest > max_len:
        shorter = row.resized(1.0, max_len / row.longest)
        if shorter.longest == row.longest:
            raise ValueError(f"{row.name} needs at least {row.longest} tokens, the engine holds {max_len}")
        row = shorter
    return row


def warm_up(vocabulary: int) -> Job:
    """The first steps of a process are slower: code and caches are cold."""
    return Job([ids(random.Random(9), 64, vocabulary)] * 4, [16] * 4, 64)


def probe(vocabulary: int) -> Job:
    """A little of everything, to learn how fast an engine is before the rows are scaled."""
    source = random.Random(8)
    return Job([ids(source, 64, vocabulary) for _ in range(4)], [16] * 4)
