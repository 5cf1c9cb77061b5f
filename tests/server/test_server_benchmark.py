"""The measuring of `benchmarks/server.py` and `benchmarks/server_requests.py`, on a server of this process."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
from serving_helpers import InProcess  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from server_client import Reader, run
from server_load import Figures, Load, Stream
from server_requests import Caller, slope


def test_the_client_counts_the_tokens_and_pieces_that_the_server_sends(tiny: InProcess) -> None:
    load = Load(streams=3, requests=7, tokens=12, words=4, seed=1)
    figures = asyncio.run(run(tiny.url, "tiny", load))
    assert figures.tokens == sum(load.request(number).max_tokens for number in range(7))
    assert 0 < figures.first_p50 <= figures.first_p99 < figures.seconds * 1e3
    assert tiny.idle()


@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
def test_events_are_counted_however_the_bytes_are_cut(cut: int) -> None:
    answer = b'HTTP/1.1 200 OK\r\na: b\r\n\r\n3\r\ndata: {"a":1}\n\n\r\ndata: {"b":2}\n\ndata: [DONE]\n\n\r\n0\r\n\r\n'

    async def read() -> int:
        reader = Reader("http://127.0.0.1:1", "tiny")
        reader._ended = asyncio.get_running_loop().create_future()
        for place in range(0, len(answer), cut):
            reader.data_received(answer[place : place + cut])
        await asyncio.wait_for(reader._ended, 1)
        return len(reader._stream.arrivals)

    assert asyncio.run(read()) == 2


def test_figures_are_those_of_the_times() -> None:
    streams = [Stream(0.0, [1.0, 1.5, 2.5], 3), Stream(1.0, [4.0], 1)]
    found = Figures.of(streams, 4.0, 0.5)
    assert (found.first_p50, found.first_p99, found.gap_p50, found.gap_p99) == (1000.0, 3000.0, 500.0, 1000.0)
    assert (found.requests_per_second, found.tokens_per_second) == (0.5, 1.0)


def test_the_slope_is_that_of_a_line_and_knows_its_error() -> None:
    assert slope([(0, 5), (1000, 15), (2000, 25)]) == (10.0, 0.0)
    source = random.Random(0)
    rise, error = slope([(x, source.randrange(1000)) for x in range(0, 10_000, 500)])
    assert abs(rise) < 3 * error


def test_every_kind_of_request_is_answered_as_it_should_be(tiny: InProcess) -> None:
    async def every() -> Counter[str]:
        count: Counter[str] = Counter()
        async with httpx.AsyncClient(base_url=tiny.url, timeout=60) as client:
            caller = Caller(client, count)
            for number in range(60):
                await caller.call(number)
        return count

    assert len(asyncio.run(every())) == 12
    assert tiny.idle()
