"""`octavo serve`: how it starts, and how it ends when it cannot."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import httpx
from serving_helpers import free_port, program


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo", "serve", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    done = serve("--model", str(tmp_path / "none"), "--port", str(free_port()))
    assert done.returncode == 1
    assert "octavo: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        done = serve("--model", str(tmp_path), "--port", str(one.getsockname()[1]))
    assert done.returncode == 2
    assert "cannot listen" in done.stderr


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for options, word in (
        (("--host", "0.0.0.0"), "--no-api-key"), (("--api-key", "a b"), "API key"), (("--dtype", "int3"), "dtype"),
        (("--served-model-name", "a", "--served-model-name", "b"), "served names"),
    ):  # fmt: skip
        done = serve(*options)
        assert done.returncode == 2, done.stderr
        assert word in done.stderr


def test_on_demand_with_a_key_for_everyone(tiny_model: Path) -> None:
    """Ready at once, loaded when asked."""
    key = {"Authorization": "Bearer secret"}
    options = ("--on-demand", "--host", "0.0.0.0", "--api-key", "secret", "--device", "cpu", "--num-blocks", "32")
    with program("--model", str(tiny_model), "--served-model-name", "tiny", *options, headers=key) as running:
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert "max_model_len" not in httpx.get(f"{running.url}/v1/models", headers=key).json()["data"][0]
        reply = httpx.post(
            f"{running.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=key, timeout=60
        )
        assert reply.status_code == 200
        assert str(tiny_model) not in reply.text
        assert httpx.get(f"{running.url}/v1/models", headers=key).json()["data"][0]["max_model_len"] > 0
