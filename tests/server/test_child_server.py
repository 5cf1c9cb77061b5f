"""`octavo serve` and the process of its engine: what a client sees when that is killed, and what is left when the
server is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serving_helpers import Program, program
from streams_client import Streamed, post

OPTIONS = ("--served-model-name", "tiny", "--device", "cpu", "--dtype", "float32", "--deterministic")
LONG = {"model": "tiny", "prompt": [5, 7, 9], "max_tokens": 300, "ignore_eos": True, "stream": True, "seed": 1}


@pytest.fixture
def running(tiny_model: Path) -> Iterator[Program]:
    with program("--model", str(tiny_model), *OPTIONS) as found:
        yield found


def engine_of(running: Program) -> psutil.Process:
    """Its process that has loaded most."""
    children = psutil.Process(running.process.pid).children()
    return max(children, key=lambda child: child.memory_info().rss)


def text_of(stream: Streamed) -> str:
    assert stream.done
    chunks = [json.loads(line[6:]) for line in stream.body.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def restarts(running: Program) -> float:
    page = httpx.get(f"{running.url}/metrics").text
    line = next(line for line in page.splitlines() if line.startswith("octavo:engine_restarts_total{"))
    return float(line.rsplit(" ", 1)[1])


def test_streams_outlive_the_engine_s_process(running: Program) -> None:
    async def scene(kill: bool) -> list[str]:
        calls = [post(running.url, "/v1/completions", LONG | {"seed": seed}, keep=True) for seed in range(8)]
        tasks = [asyncio.create_task(call) for call in calls]
        if kill:
            await asyncio.sleep(0.5)
            engine_of(running).kill()
        return [text_of(stream) for stream in await asyncio.gather(*tasks)]

    calm = asyncio.run(scene(kill=False))
    assert asyncio.run(scene(kill=True)) == calm
    assert restarts(running) == 1


def test_the_server_ends_with_an_error_when_its_engine_cannot_come_back(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with program("--model", str(tmp_path), *OPTIONS) as running:
        (tmp_path / "model.safetensors").write_bytes(b"gone")
        engine_of(running).kill()
        assert running.process.wait(60) not in (0, None)


def test_a_server_that_is_killed_leaves_nothing(running: Program) -> None:
    server = psutil.Process(running.process.pid)
    end = time.monotonic() + 30
    while len(children := server.children(recursive=True)) < 2:  # the engine, and one in advance
        assert time.monotonic() < end
        time.sleep(0.1)
    shared = set(Path("/dev/shm").iterdir())
    running.process.send_signal(signal.SIGKILL)
    running.process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert set(Path("/dev/shm").iterdir()) <= shared
    port = int(running.url.rsplit(":", 1)[1])
    with contextlib.suppress(psutil.AccessDenied):
        assert all(one.laddr.port != port for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN)


def test_the_server_s_own_process_has_no_torch(running: Program) -> None:
    assert "libtorch" not in Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{engine_of(running).pid}/maps").read_text()
    own = psutil.Process(running.process.pid).memory_info().rss / 1e6
    print(f"the server's own process holds {own:.0f} MB")
