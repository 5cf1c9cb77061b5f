"""The requests of `benchmarks/server.py`, and what their streams showed. Shared by its client over HTTP and by its
engine in process. Standard library only: the client must cost little.

A load is a number of streams and of requests. Every stream sends its next request when the one before has ended (a
closed loop), until all have been sent; requests with even numbers are chats, the others completions. Both sides are
given the same texts, lengths and seeds. No two requests of a run begin alike, so that the prefix cache knows none.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

WORDS = (
    "light", "house", "keeper", "storm", "night", "water", "stone", "wind", "letter", "lamp", "harbour", "ship",
    "winter", "bread", "garden", "road", "river", "bell", "clock", "mountain", "window", "child", "story", "morning",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    streams: int
    requests: int
    tokens: int
    """Mean length of outputs: each has half as many to half as many again."""
    words: int
    """Of each prompt."""
    seed: int
    """Another one for every run."""

    def request(self, number: int) -> Request:
        source = random.Random(f"{self.seed}/{number}")
        text = f"{self.seed}.{number}: " + " ".join(source.choice(WORDS) for _ in range(self.words))
        low, high = math.ceil(self.tokens / 2), self.tokens * 3 // 2
        return Request(number % 2 == 0, text, source.randint(low, high), source.randrange(2**31))


@dataclass(frozen=True)
class Request:
    chat: bool
    text: str
    max_tokens: int
    seed: int

    @property
    def sampling(self) -> dict[str, Any]:
        """Names of `SamplingParams` and of the API alike."""
        return {"max_tokens": self.max_tokens, "temperature": 0.7, "seed": self.seed, "ignore_eos": True}

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]


@dataclass
class Stream:
    """One request as its reader saw it. Times by `time.perf_counter()`."""

    began: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)
    """Of each piece of text."""
    tokens: int = 0


@dataclass(frozen=True)
class Figures:
    """Of one run of a load, as its readers saw it."""

    seconds: float
    requests_per_second: float
    tokens: int
    tokens_per_second: float
    first_p50: float
    """Milliseconds from sending a request to its first text."""
    first_p99: float
    gap_p50: float
    """Milliseconds between two pieces of text of a stream."""
    gap_p99: float
    reader_cpu: float
    """Processor seconds of the readers' process."""

    @staticmethod
    def of(streams: list[Stream], seconds: float, reader_cpu: float) -> Figures:
        tokens = sum(one.tokens for one in streams)
        firsts = sorted(one.arrivals[0] - one.began for one in streams)
        gaps = sorted(b - a for one in streams for a, b in zip(one.arrivals, one.arrivals[1:], strict=False))
        return Figures(
            seconds, len(streams) / seconds, tokens, tokens / seconds, at(firsts, 0.5) * 1e3, at(firsts, 0.99) * 1e3,
            at(gaps, 0.5) * 1e3, at(gaps, 0.99) * 1e3, reader_cpu,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        return asdict(self)


def at(ordered: list[float], share: float) -> float:
    """The least of these values that is not below `share` of them."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else math.nan
