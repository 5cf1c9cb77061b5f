"""Requests that end or stop the engine's process each time, beside others that do not."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from child_helpers import SETTINGS, child, essence, here, pid_of, service_of
from octavo import SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.engine.child import processes, service
from octavo.engine.child.placement import InChild
from octavo.errors import EngineClosedError, RequestFailedError
from octavo.server.app import create_app
from octavo.server.models import Models, served_models
from poisoned_engine import DIES, DIES_LATE, HANGS, LATE, LOSES, RAISES
from serving_helpers import InProcess

POISONED = InChild((sys.executable, str(Path(__file__).with_name("poisoned_engine.py"))))
FINE = [[5 + number, 9, 11 + number] for number in range(6)]
PARAMS = SamplingParams(max_tokens=200, ignore_eos=True, seed=4)


async def test_two_poisoned_prompts_fail_alone_and_the_rest_is_as_ever(tiny_model: Path) -> None:
    with here(tiny_model) as other:
        wanted = [essence(output) for output in await other.generate(FINE, PARAMS)]
    prompts = [FINE[0], [DIES, 6], *FINE[1:3], [8, DIES], *FINE[3:]]
    with child(tiny_model, POISONED) as llm:
        found = await llm.generate(prompts, PARAMS, return_exceptions=True)
        restarts = service_of(llm).restarts
        again = await llm.generate(FINE[:1], PARAMS)
    failed = [found.pop(4), found.pop(1)]
    assert all(isinstance(error, RequestFailedError) for error in failed)
    assert [essence(output) for output in found] == wanted
    assert essence(again[0]) == wanted[0]
    print(f"{restarts} processes for two poisoned prompts among eight")
    assert restarts <= 8


async def test_a_stream_that_kills_in_its_middle_keeps_what_it_had(tiny_model: Path) -> None:
    with child(tiny_model, POISONED) as llm:
        stream = llm.stream([DIES_LATE], PARAMS)
        tokens = [token for _ in range(LATE) for token in (await anext(stream)).token_ids]
        with pytest.raises(RequestFailedError, match="each time"):
            await anext(stream)
        assert len(tokens) == LATE
        assert not service_of(llm)._ledger.entries


async def test_a_step_that_never_ends_is_ended(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STUCK_SECONDS", 0.8)
    with child(tiny_model, POISONED) as llm:
        fine = asyncio.ensure_future(llm.generate(FINE, PARAMS))
        with pytest.raises(RequestFailedError):
            await llm.generate([[HANGS]], PARAMS)
        assert all(output.finished for output in await fine)


async def test_a_device_that_is_lost_takes_a_new_process_and_not_the_others(tiny_model: Path) -> None:
    with here(tiny_model) as other:
        wanted = [essence(output) for output in await other.generate(FINE, PARAMS)]
    with child(tiny_model, POISONED) as llm:
        *found, failed = await llm.generate([*FINE, [LOSES]], PARAMS, return_exceptions=True)
        assert isinstance(failed, RequestFailedError)
        assert [essence(output) for output in found] == wanted


def test_over_http_each_fails_alone_with_its_id_and_nothing_of_ours(tiny_model: Path) -> None:
    served = served_models([str(tiny_model)], ["tiny"], SETTINGS)
    running = InProcess(create_app(Models(served, load=lambda config: AsyncLLM.of(config, POISONED))))
    fine = {"model": "tiny", "prompt": FINE, "max_tokens": 200, "ignore_eos": True, "seed": 4}
    try:
        with ThreadPoolExecutor(3) as threads:

            def post(**changes: object) -> httpx.Response:
                return httpx.post(f"{running.url}/v1/completions", json=fine | changes, timeout=120)

            calm = [choice["text"] for choice in post().json()["choices"]]
            beside = threads.submit(post)
            replies = [future.result() for future in [threads.submit(post, prompt=[bad]) for bad in (RAISES, DIES)]]
            assert [choice["text"] for choice in beside.result().json()["choices"]] == calm
        for reply in replies:
            assert reply.status_code == 500
            error = reply.json()["error"]
            assert reply.headers["X-Request-Id"] in error["message"]
            assert "ours" not in reply.text
            assert "shapes" not in reply.text
        assert running.idle()
    finally:
        running.close()


async def test_it_gives_up_where_no_process_comes_up(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    with child(model) as llm:
        stream = llm.stream(FINE[0], PARAMS)
        await anext(stream)
        (model / "model.safetensors").write_bytes(b"gone")
        began = time.monotonic()
        os.kill(pid_of(llm), 9)
        with pytest.raises(EngineClosedError, match=rf"{service.ATTEMPTS} times in a row"):
            async for _ in stream:
                pass
        print(f"gave up after {time.monotonic() - began:.1f} s")
        assert service_of(llm).closed
        assert isinstance(service_of(llm).failure, EngineClosedError)
        with pytest.raises(EngineClosedError, match="in a row"):
            await llm.generate([FINE[0]])
