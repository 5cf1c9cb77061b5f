"""Servers for the tests here: the real program in a process of its own, and an app in this process, for looks at its
engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

CHAT, EMBEDDER = "chat", "embedder"
"""Their names for clients."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until_ready(
    url: str, seconds: float = 90, headers: dict[str, str] | None = None, process: subprocess.Popen[bytes] | None = None
) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and (process is None or process.poll() is None):
        try:
            if httpx.get(f"{url}/ready", headers=headers).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server did not become ready")


@dataclass
class Program:
    """`octavo serve` in a process of its own."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@contextmanager
def program(*options: str, headers: dict[str, str] | None = None, threads: int = 1) -> Iterator[Program]:
    """`threads`: of the engine. Two cores are shared with the server's own process and with its clients."""
    port = free_port()
    command = [sys.executable, "-m", "octavo", "serve", "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", headers=headers, process=process)
            yield Program(f"http://127.0.0.1:{port}", process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.seek(0)
            sys.stdout.write(log.read().decode(errors="replace")[-4000:])


class InProcess:
    """An app on a real port, on a thread of this process."""

    def __init__(self, app: Any, headers: dict[str, str] | None = None) -> None:
        import uvicorn
        from octavo.server.headers import BoundedHeaders

        self.app = app
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, port=self.port, log_level="warning", http=BoundedHeaders, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()
        wait_until_ready(self.url, headers=headers)

    @property
    def llm(self) -> Any:
        """The engine's client of the first model."""
        return self.app.state.server.models.loaded()[0].llm

    def idle(self, seconds: float = 5) -> bool:
        """Whether the engine comes to rest: nothing runs or waits, no block is held."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.llm.stats()
            if stats.running == stats.waiting == stats.blocks_used == 0:
                return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


@contextmanager
def in_process(
    model: Path, *, keys: tuple[str, ...] = (), settings: dict[str, Any] | None = None, **engine: Any
) -> Iterator[InProcess]:
    from octavo.server.app import create_app
    from octavo.server.models import Models, served_models
    from octavo.server.settings import ServerSettings

    app = create_app(
        Models(served_models([str(model)], ["tiny"], {"device": "cpu", **engine})),
        ServerSettings(api_keys=keys, **(settings or {})),
    )
    running = InProcess(app, {"Authorization": f"Bearer {keys[0]}"} if keys else None)
    try:
        yield running
    finally:
        running.close()


class Beside:
    """A stream that goes on all the time, begun anew when it ends, while other things are done to its server."""

    def __init__(self, server: InProcess) -> None:
        self.texts: list[str] = []
        self.frames = 0
        self.longest_gap = 0.0
        self.stop = threading.Event()
        self._url = f"{server.url}/v1/completions"
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    @classmethod
    @contextmanager
    def of(cls, server: InProcess) -> Iterator[Beside]:
        """At the end, all of its answers were the same, and the engine comes to rest."""
        running = cls(server)
        yield running
        running.stop.set()
        running.thread.join(30)
        assert len(set(running.texts)) == 1
        assert server.idle()

    @contextmanager
    def goes_on(self) -> Iterator[None]:
        """Without a long gap, and after whatever is done meanwhile."""
        self.longest_gap = 0.0
        yield
        seen, end = self.frames, time.monotonic() + 5
        while self.frames < seen + 3:
            assert time.monotonic() < end, "the stream stands still"
            assert self.thread.is_alive()
            time.sleep(0.002)
        assert self.longest_gap < 2.0

    def _run(self) -> None:
        while not self.stop.is_set():
            self.texts.append(self._read())

    def _read(self) -> str:
        body = {"prompt": [80, 81], "max_tokens": 60, "ignore_eos": True, "temperature": 0, "stream": True}
        with httpx.stream("POST", self._url, json=body, timeout=30) as reply:
            last, text = time.monotonic(), ""
            for line in reply.iter_lines():
                self.longest_gap = max(self.longest_gap, time.monotonic() - last)
                last = time.monotonic()
                self.frames += 1
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text
