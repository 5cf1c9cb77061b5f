"""A full queue: refused at once, and nothing is lost by it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving_helpers import InProcess, in_process


@pytest.fixture(scope="module")
def narrow(tiny_model: Path) -> Iterator[InProcess]:
    with in_process(tiny_model, num_blocks=256, block_size=16, max_num_seqs=2, max_queued_requests=4) as running:
        yield running


def test_beyond_the_bound_429_at_once(narrow: InProcess) -> None:
    body = {"prompt": [70], "max_tokens": 100, "ignore_eos": True, "n": 2}

    def ask(_: int) -> tuple[int, str, float]:
        with httpx.Client() as client:
            began = time.perf_counter()
            reply = client.post(f"{narrow.url}/v1/completions", json=body, timeout=60)
            return reply.status_code, reply.headers.get("retry-after", ""), time.perf_counter() - began

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(48)))
    refused = [each for each in found if each[0] == 429]
    assert {status for status, _, _ in found} == {200, 429}
    assert len(refused) < 48 - 4
    assert all(retry.isdecimal() and int(retry) > 0 for _, retry, _ in refused)
    assert narrow.idle()


def test_one_refusal_takes_no_time(narrow: InProcess) -> None:
    body = {"prompt": [[70]] * 4, "max_tokens": 100, "ignore_eos": True, "n": 8}
    with ThreadPoolExecutor(1) as pool, httpx.Client() as client:
        client.get(f"{narrow.url}/health")
        running = pool.submit(httpx.post, f"{narrow.url}/v1/completions", json=body, timeout=60)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            reply = client.post(f"{narrow.url}/v1/completions", json={"prompt": [[70]] * 12})
            times.append(time.perf_counter() - began)
            assert reply.status_code == 429
        running.result()
    assert sorted(times)[10] < 0.05
    assert narrow.idle()


def test_a_call_with_many_prompts_runs_whole_or_not_at_all(narrow: InProcess) -> None:
    reply = httpx.post(f"{narrow.url}/v1/completions", json={"prompt": [[70]] * 40, "max_tokens": 50})
    assert reply.status_code == 429
    assert narrow.idle()


def test_embeddings_are_bounded_too(tiny_model: Path) -> None:
    from octavo.models.sources import EMBEDDING_MODEL, resolve

    with in_process(resolve(EMBEDDING_MODEL).path, max_queued_requests=4) as running:
        url = f"{running.url}/v1/embeddings"
        assert httpx.post(url, json={"input": ["a"] * 200}, timeout=60).status_code == 429
        assert httpx.post(url, json={"input": ["a"] * 4}, timeout=60).status_code == 200
