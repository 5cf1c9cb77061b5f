"""A thousand streams at once."""

from __future__ import annotations

import asyncio
import resource
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving_helpers import Program, program  # type: ignore[import-not-found]
from streams_client import Streamed, post  # type: ignore[import-not-found]

STREAMS, TOKENS, ROWS = 1000, 8, 64
MEMORY_OF_A_STREAM = 150_000
"""Bytes, of server and engine together: connection, task, request, its tokens."""


class Peak:
    """The most memory that some processes hold together, sampled."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes, self._stop = processes, threading.Event()
        self.base = self.most = self._at_rest()
        self._thread = threading.Thread(target=self._watch)

    def now(self) -> int:
        return sum(process.memory_info().rss for process in self._processes)

    def _at_rest(self, seconds: float = 60) -> int:
        """Once it stays level: a process that is kept in advance is loading for some seconds."""
        end, before = time.monotonic() + seconds, 0
        while (now := self.now()) > before + (1 << 20) and time.monotonic() < end:
            before = now
            time.sleep(2)
        return now

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.most = max(self.most, self.now())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def busy(tiny_model: Path) -> Iterator[Program]:
    """A tiny model with room for a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4 * STREAMS and hard >= 4 * STREAMS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4 * STREAMS, hard))
    options = ("--max-num-seqs", str(ROWS), "--max-queued-requests", str(STREAMS), "--log-level", "warning")
    with program("--model", str(tiny_model), "--served-model-name", "tiny", "--device", "cpu", *options) as running:
        yield running


def request(number: int, tokens: int = TOKENS) -> dict[str, object]:
    return {
        "model": "tiny", "prompt": [3 + number % 200, 7, 9], "max_tokens": tokens, "ignore_eos": True, "stream": True,
        "seed": number,
    }  # fmt: skip


async def crowd(url: str, numbers: range, tokens: int = TOKENS) -> list[Streamed]:
    return await asyncio.gather(*(post(url, "/v1/completions", request(number, tokens)) for number in numbers))


def test_a_thousand_streams_all_finish_in_turn(busy: Program) -> None:
    parent = psutil.Process(busy.process.pid)
    asyncio.run(crowd(busy.url, range(100)))  # what is held for ever is held from here on
    with Peak([parent, *parent.children(recursive=True)]) as memory:
        began = time.monotonic()
        streams = asyncio.run(crowd(busy.url, range(STREAMS)))
        seconds = time.monotonic() - began
    assert [one.status for one in streams] == [200] * STREAMS
    assert all(one.done for one in streams)
    each = (memory.most - memory.base) / STREAMS
    running = [one.ended - one.arrivals[0] for one in streams]
    begun = sorted(range(STREAMS), key=lambda number: streams[number].arrivals[0])
    ended = sorted(range(STREAMS), key=lambda number: streams[number].ended)
    place = {number: rank for rank, number in enumerate(ended)}
    overtaken = max(place[number] - rank for rank, number in enumerate(begun))
    print(
        f"{STREAMS} streams of {TOKENS} tokens: {seconds:.1f} s, {STREAMS * TOKENS / seconds:.0f} tokens/s, "
        f"{each / 1e3:.0f} kB a stream; from first token to last: median {statistics.median(running):.2f} s, "
        f"longest {max(running):.2f} s; at most {overtaken} ended before one that began before them"
    )
    assert each < MEMORY_OF_A_STREAM
    assert overtaken < 2 * ROWS, "some starve while others run"
