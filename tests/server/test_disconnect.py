"""A client that goes away, at any stage, frees what its request held."""

from __future__ import annotations

import json
import socket
import time

import httpx
from serving_helpers import InProcess

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LONG = {"prompt": [[70, 71, 72]] * 16, "max_tokens": 100, "min_tokens": 100, "n": 8, "ignore_eos": True}


def begun(tiny: InProcess, body: object) -> socket.socket:
    """A request that is sent, and whose answer nobody reads yet."""
    data = json.dumps(body).encode()
    one = socket.create_connection(("127.0.0.1", tiny.port))
    one.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return one


def running(tiny: InProcess, more_than: int = 0) -> bool:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        stats = tiny.llm.stats()
        if stats.running + stats.waiting > more_than:
            return True
    return False


def test_while_it_waits_for_a_whole_answer(tiny: InProcess) -> None:
    one = begun(tiny, LONG)
    assert running(tiny)
    one.close()
    assert tiny.idle()


def test_in_the_middle_of_a_stream(tiny: InProcess) -> None:
    with httpx.stream("POST", f"{tiny.url}/v1/completions", json={**LONG, "stream": True}) as reply:
        lines = reply.iter_lines()  # held: httpx closes the connection with the iterator
        next(lines)
        assert running(tiny)
    assert tiny.idle()


def test_while_it_waits_in_the_queue(tiny: InProcess) -> None:
    many = [begun(tiny, LONG) for _ in range(12)]  # 1536 sequences, of which 16 run
    assert running(tiny, more_than=50)
    for one in reversed(many):
        one.close()
    assert tiny.idle()


def test_before_the_body_is_there(tiny: InProcess) -> None:
    one = socket.create_connection(("127.0.0.1", tiny.port))
    one.sendall(HEAD + b"Content-Length: 99\r\n\r\n{")
    one.close()
    assert tiny.idle()


def test_users_of_a_model_are_counted_down(tiny: InProcess) -> None:
    for stream in (False, True):
        one = begun(tiny, {**LONG, "stream": stream})
        assert running(tiny)
        one.close()
        assert tiny.idle()
    end = time.monotonic() + 5
    while tiny.app.state.server.models.loaded()[0].users and time.monotonic() < end:
        time.sleep(0.01)
    assert tiny.app.state.server.models.loaded()[0].users == 0
