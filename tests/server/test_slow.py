"""Clients that send or take too slowly are let go of, and hold nothing meanwhile that is not bounded."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from octavo.server import headers
from serving_helpers import InProcess, in_process

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def hasty(tiny_model: Path) -> Iterator[InProcess]:
    settings = {"body_seconds": 0.5, "write_seconds": 1.0}
    with in_process(tiny_model, settings=settings, num_blocks=256, block_size=16, max_num_seqs=64) as running:
        yield running


def test_a_client_that_reads_nothing(hasty: InProcess) -> None:
    body = {"prompt": [[70]] * 16, "n": 8, "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": 20}
    data = json.dumps(body).encode()
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", hasty.port))
        one.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        end = time.monotonic() + 60
        models = hasty.app.state.server.models
        while not models.loaded()[0].users:
            assert time.monotonic() < end
        while models.loaded()[0].users:  # until the server has given it up
            assert time.monotonic() < end
            time.sleep(0.05)
        assert hasty.idle()


def test_a_body_that_does_not_come(hasty: InProcess) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as one:
        one.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        assert one.recv(65536).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("begin", [b"", b"POST /v1/completions HTTP/1.1\r\nHo"])
def test_a_head_that_does_not_end(hasty: InProcess, begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "HEAD_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as one:
        one.sendall(begin)
        assert one.recv(65536) == b""
