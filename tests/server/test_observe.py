"""What the server reports of each call, for whoever measures."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from octavo.outputs import RequestMetrics
from octavo.server.app import create_app
from octavo.server.models import Models, served_models
from octavo.server.observe import Observer, Watch
from serving_helpers import InProcess


class Noted(Watch):
    def __init__(self, *begin: str) -> None:
        self.begin, self.made = begin, 0
        self.metrics: Sequence[RequestMetrics] = ()
        self.reasons: Sequence[str] = ()
        self.problem: BaseException | None = None

    def tokens(self, count: int) -> None:
        self.made += count

    def end(self, metrics: Sequence[RequestMetrics], finish_reasons: Sequence[str]) -> None:
        assert not self.metrics, "twice"
        self.metrics, self.reasons = metrics, finish_reasons

    def error(self, error: BaseException) -> None:
        assert self.problem is None, "twice"
        self.problem = error


class Notes(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[Noted] = []

    def begin(self, endpoint: str, model: str, request_id: str, headers: Mapping[str, str]) -> Watch:
        self.all.append(Noted(endpoint, model, request_id))
        return self.all[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_every_call_is_reported_once(tiny_model: Path, stream: bool) -> None:
    notes = Notes()
    served = served_models([str(tiny_model)], ["tiny"], {"device": "cpu", "num_blocks": 64, "block_size": 16})
    running = InProcess(create_app(Models(served), observer=notes))
    try:
        url, body = f"{running.url}/v1/completions", {"max_tokens": 5, "ignore_eos": True, "stream": stream}
        assert httpx.post(url, json={**body, "prompt": [[70], [71, 72]], "request_id": "mine"}).status_code == 200
        assert httpx.post(url, json={**body, "prompt": [300]}).status_code == 400
        long = {**body, "prompt": [[70]] * 64, "max_tokens": 100, "n": 8}
        with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=long, timeout=0.3) as reply:
            next(reply.iter_bytes())  # and away, before or after the first bytes
        assert running.idle()
    finally:
        running.close()
    whole, refused, left = notes.all
    assert whole.begin == ("completions", "tiny", "mine")
    assert (whole.made, whole.reasons, whole.problem) == (10, ["length", "length"], None)
    assert [one.prompt_tokens for one in whole.metrics] == [1, 2]
    assert refused.problem is not None
    assert isinstance(left.problem, asyncio.CancelledError)
    assert not left.metrics
