"""How a server ends: it drains, or a second signal ends it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serving_helpers import Program, program
from streams_client import Streamed, post

LONG = {"model": "tiny", "prompt": [5, 7, 9], "max_tokens": 100, "ignore_eos": True, "stream": True}
SLOW = LONG | {"n": 32, "max_tokens": 200, "logprobs": 5}


@pytest.fixture
def ending(tiny_model: Path) -> Iterator[Program]:
    options = ("--served-model-name", "tiny", "--device", "cpu", "--drain-seconds", "120", "--max-num-seqs", "4")
    with program("--model", str(tiny_model), *options) as running:
        yield running


def ends_with(running: Program, seconds: float) -> int:
    return running.process.wait(seconds)


def test_a_signal_lets_running_streams_end_and_refuses_others(ending: Program) -> None:
    async def scene() -> tuple[Streamed, httpx.Response, httpx.Response, float]:
        stream = asyncio.create_task(post(ending.url, "/v1/completions", SLOW))
        async with httpx.AsyncClient(base_url=ending.url) as client:
            while not (await client.get("/metrics")).text.count('vllm:num_requests_running{model_name="tiny"} 4.0'):
                assert not stream.done()
            assert (await client.get("/ready")).status_code == 200
            ending.process.send_signal(signal.SIGTERM)
            signalled = time.monotonic()
            while (ready := await client.get("/ready")).status_code == 200:
                assert time.monotonic() < signalled + 1
            after = time.monotonic() - signalled
            refused = await client.post("/v1/completions", json=LONG)
        return await stream, ready, refused, after

    stream, ready, refused, after = asyncio.run(scene())
    print(f"/ready said 503 after {after * 1e3:.0f} ms")
    assert (ready.status_code, refused.status_code) == (503, 503)
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.json()["error"]["code"] == "ending"
    assert stream.status == 200
    assert stream.done, "the stream was cut"
    assert ends_with(ending, 10) == 0


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_now(ending: Program, sig: signal.Signals) -> None:
    async def scene() -> float:
        stream = asyncio.create_task(post(ending.url, "/v1/completions", SLOW))
        await asyncio.sleep(0.5)
        assert not stream.done()
        ending.process.send_signal(sig)
        await asyncio.sleep(0.3)
        assert ending.process.poll() is None
        began = time.monotonic()
        ending.process.send_signal(sig)
        await asyncio.to_thread(ending.process.wait, 10)
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        return time.monotonic() - began

    children = psutil.Process(ending.process.pid).children(recursive=True)
    assert asyncio.run(scene()) < 5
    assert ending.process.returncode == 0
    assert not [child for child in children if child.is_running()]


def test_idle_it_ends_at_once(ending: Program) -> None:
    ending.process.send_signal(signal.SIGTERM)
    assert ends_with(ending, 5) == 0
