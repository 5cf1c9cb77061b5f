"""Hostile input: a 4xx within a second that names the field and says nothing of ours; a stream beside it goes on."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving_helpers import Beside, InProcess

BIG = [-1, 2**31, 2**63, 2**64, 1.5, "1", True, [], {}]
LEAK = re.compile(r"Traceback|File \"|/tmp|/work|/root|site-packages|\.py\b|0x[0-9a-f]{6,}|octavo\.server")


@pytest.fixture(scope="module")
def beside(tiny: InProcess) -> Iterator[Beside]:
    with Beside.of(tiny) as running:
        yield running


@pytest.fixture(autouse=True)
def stream_goes_on(beside: Beside) -> Iterator[None]:
    with beside.goes_on():
        yield


def refused(tiny: InProcess, path: str, body: Any, param: str | None = None, status: int = 400) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    began = time.monotonic()
    reply = httpx.post(tiny.url + path, content=data, headers={"Content-Type": "application/json"}, timeout=20)
    took = time.monotonic() - began
    error: dict[str, Any] = reply.json()["error"]
    assert reply.status_code == status, (body if len(data) < 500 else "", reply.text)
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1100
    assert not LEAK.search(error["message"]), error
    if param is not None:
        assert error["param"] is not None, error
        assert error["param"].split(".")[0] == param, error
    assert took < 2.0  # a second, on a machine that others use
    return error


# -- 1: numbers ------------------------------------------------------------------------------------------------------

ZERO = {"n": [0], "max_tokens": [0], "best_of": [0], "beam_width": [0], "truncate_prompt_tokens": [0]}
MILLION = (
    "n", "max_tokens", "best_of", "logprobs", "prompt_logprobs", "beam_width", "min_tokens", "truncate_prompt_tokens",
)  # fmt: skip
FINE = {"top_k": (-1,), "truncate_prompt_tokens": (-1,), "seed": (-1, 2**31)}
INTEGERS = (
    "n", "max_tokens", "best_of", "logprobs", "prompt_logprobs", "top_k", "min_tokens", "beam_width", "priority",
    "no_repeat_ngram_size", "truncate_prompt_tokens", "seed",
)  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_out_of_range(tiny: InProcess, name: str) -> None:
    values = [value for value in BIG if value not in FINE.get(name, ()) or isinstance(value, bool)]
    if name == "priority":
        values.remove(-1)
    values += ZERO.get(name, [])
    values += [10**6] if name in MILLION else []
    more = {"use_beam_search": True} if name == "beam_width" else {}
    for value in values:
        refused(tiny, "/v1/completions", {"prompt": [70], "max_tokens": 2, **more, name: value}, name)


def test_null_is_not_given(tiny: InProcess) -> None:
    body = {"prompt": [70], **dict.fromkeys(INTEGERS), "stop": None, "logit_bias": None, "temperature": None}
    assert httpx.post(f"{tiny.url}/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty"],
)
def test_floats_that_are_none(tiny: InProcess, name: str) -> None:
    for text in ("NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e999", '"1"', "true", "[1]"):
        search = ', "use_beam_search": true' if name == "length_penalty" else ""
        body = f'{{"prompt": [70], "max_tokens": 2{search}, "{name}": {text}}}'
        refused(tiny, "/v1/completions", body.encode(), None if "n" in text.lower() else name)


@pytest.mark.parametrize(
    "bias",
    [
        {"-1": 1}, {"300": 1}, {"1000000000": 1}, {"x": 1}, {"1": 101}, {"1": "2"}, {"١": 1}, [1],
        {str(i): 1 for i in range(10**5)},
    ],
)  # fmt: skip
def test_biases(tiny: InProcess, bias: Any) -> None:
    refused(tiny, "/v1/completions", {"prompt": [70], "logit_bias": bias}, "logit_bias")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", [""]), ("stop", ["x"] * 65), ("stop", "y" * 2000), ("stop", [1]), ("stop_token_ids", [-1]),
        ("stop_token_ids", [300]), ("stop_token_ids", list(range(2000))), ("allowed_token_ids", []),
        ("allowed_token_ids", [10**9]), ("bad_words", ["w"] * 2000), ("suffix", "x"), ("unknown", 1),
        ("guided_choice", []), ("guided_regex", "("), ("structured_outputs", {"json": {}, "regex": "a"}),
        ("structured_outputs", {"nope": 1}), ("stream_options", {"include_usage": True}), ("request_id", "a\r\nb"),
        ("cache_salt", ""), ("spaces_between_special_tokens", False), ("response_format", {"type": "xml"}),
    ],
)  # fmt: skip
def test_lists_and_others(tiny: InProcess, name: str, value: Any) -> None:
    refused(tiny, "/v1/completions", {"prompt": [70], name: value}, name)


# -- 2: prompts and bodies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [], [-1], [300], [2**31], [2**64], [1.5], ["a", 1], [[]], [[1], []], [[1], "a"], "", {}, 5, [None],
        [70] * 20_000, [[70]] * 1025, "a" * 10_000_000, "\x00" * 2_000_000, ["a" * 5_000_000] * 2, "é" * 2_000_000,
    ],
)  # fmt: skip
def test_prompts(tiny: InProcess, prompt: Any) -> None:
    refused(tiny, "/v1/completions", {"prompt": prompt}, "prompt")


def test_context_and_one(tiny: InProcess) -> None:
    room = tiny.llm.engine.limits.max_model_len
    refused(tiny, "/v1/completions", {"prompt": [70] * room, "max_tokens": 1}, "prompt")
    reply = httpx.post(f"{tiny.url}/v1/completions", json={"prompt": [70] * (room - 1), "max_tokens": 1}, timeout=30)
    assert reply.status_code == 200


@pytest.mark.parametrize("text", ["a\x00b", "<|im_end|><s></s>", "\u202e\ufeff", "🙂" * 20])
def test_odd_texts_are_text(tiny: InProcess, text: str) -> None:
    reply = httpx.post(f"{tiny.url}/v1/completions", json={"prompt": text, "max_tokens": 1})
    assert reply.status_code == 200


def test_half_surrogates(tiny: InProcess) -> None:
    for path, body in (
        ("/v1/completions", b'{"prompt": "a\\ud800b"}'),
        ("/v1/completions", b'{"prompt": "a", "stop": "\\uDC00"}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud83d"}]}'),
        ("/tokenize", b'{"prompt": "\\udfff"}'),
    ):
        refused(tiny, path, body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}", b"", b"{", b"[]", b"1",
        b"null", b"\xff\xfe", b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a"} x', b'{"prompt": "a\nb"}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_json(tiny: InProcess, body: bytes) -> None:
    refused(tiny, "/v1/completions", body)


MANY = 4_000_000


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":[' + b"[]," * MANY + b"[]]}", b'{"prompt":[' + b"7," * MANY + b"7]}",
        b'{"prompt":[' + b"[7]," * MANY + b"[7]]}", b'{"prompt":[' + b"1.5," * MANY + b"7]}",
        b'{"prompt":[' + b"1.5," * 399_000 + b"7]}", b'{"prompt":[' + b"[7.5]," * 199_000 + b"[7]]}",
        b"{" + b",".join(b'"%x":1' % name for name in range(300_000)) + b"}", b'{"prompt":[' + b'"a",' * MANY + b"7]}",
        b'{"stop":[' + b"{}," * 150_000 + b"7]}", b'{"prompt": "a", "messages":[' + b"{}," * 150_000 + b"7]}",
    ],
    ids=range(10),
)  # fmt: skip
def test_bodies_with_many_values(tiny: InProcess, body: bytes) -> None:
    refused(tiny, "/v1/completions", body)
    refused(tiny, "/v1/chat/completions", body)


def raw(tiny: InProcess, *parts: bytes, pause: float = 0.0) -> bytes:
    """What comes back for bytes as they are."""
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=5) as one:
        try:
            for part in parts:
                one.sendall(part)
                time.sleep(pause)
        except OSError:
            pass  # it was closed already
        found = b""
        try:
            while b"\r\n\r\n" not in found and (data := one.recv(65536)):
                found += data
        except OSError:
            pass
        return found


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_gigabyte_is_refused_unread(tiny: InProcess) -> None:
    assert raw(tiny, HEAD + b"Content-Length: 1073741824\r\n\r\n{").startswith(b"HTTP/1.1 413")


def test_chunks_without_end_are_refused(tiny: InProcess) -> None:
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    reply = raw(tiny, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 20)
    assert reply.startswith(b"HTTP/1.1 413") or reply == b""


def test_a_content_length_that_lies(tiny: InProcess) -> None:
    reply = raw(tiny, HEAD + b"Content-Length: 2\r\n\r\n{}garbage that is no request\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 400")
    assert raw(tiny, HEAD + b"Content-Length: -5\r\n\r\n{}").startswith(b"HTTP/1.1 400")
    assert raw(tiny, HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")[:12] == b"HTTP/1.1 400"


def test_chunks_that_are_cut(tiny: InProcess) -> None:
    assert raw(tiny, HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n").startswith(b"HTTP/1.1 400")


def test_ten_megabytes_of_headers(tiny: InProcess) -> None:
    reply = raw(tiny, HEAD + b"X-Long: ", *[b"a" * 100_000] * 100)
    assert reply.startswith(b"HTTP/1.1 431") or reply == b""  # the reset can overtake the answer
    many = b"".join(b"X-%d: a\r\n" % place for place in range(100_000))
    reply = raw(tiny, HEAD + many)
    assert reply.startswith(b"HTTP/1.1 431") or reply == b""


def test_compressed_bodies_are_refused(tiny: InProcess) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    reply = httpx.post(f"{tiny.url}/v1/completions", content=bomb, headers=headers)
    assert reply.status_code == 415
    reply = httpx.post(f"{tiny.url}/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415


# -- chats -----------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": [{}]}, "messages"), ({"messages": "a"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages"), ({"messages": [USER] * 5000}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 10_000_000}]}, "messages"),
        ({"messages": [{**USER, "odd": 1}]}, "messages"), ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, "messages"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs"), ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"store": True}, "store"), ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"), ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"), ({"prediction": {"type": "content"}}, "prediction"),
        ({"service_tier": "flex"}, "service_tier"), ({"metadata": {"a": "b"}}, "metadata"),
        ({"verbosity": "high"}, "verbosity"),
        ({"reasoning_effort": "high"}, "reasoning_effort"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"max_completion_tokens": 2**31}, "max_completion_tokens"), ({"store": 0}, "store"), ({"n": 129}, "n"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, "response_format"),
        ({"model": "x" * 300}, "model"), ({"user": 5}, "user"), ({"stream": "yes"}, "stream"),
    ],
)  # fmt: skip
def test_chats(tiny: InProcess, more: dict[str, Any], param: str) -> None:
    refused(tiny, "/v1/chat/completions", {"messages": [USER], **more}, param)


@pytest.mark.parametrize("name", ["odd", "\x00", "é-", "str", "", "list[str]"])
def test_unknown_names_come_back(tiny: InProcess, name: str) -> None:
    for body, place in (({name: 1}, name), ({"messages": [{**USER, name: 1}]}, f"messages.0.{name}")):
        error = refused(tiny, "/v1/chat/completions", {"messages": [USER], **body})
        assert error["code"] == "unknown_field"
        assert error["param"] == place.rstrip(".")


def test_a_model_that_is_not_there(tiny: InProcess) -> None:
    error = refused(tiny, "/v1/completions", {"model": "../../etc/passwd", "prompt": "a"}, "model", 404)
    assert error["code"] == "model_not_found"
    refused(tiny, "/v1/embeddings", {"input": "a"}, "model")
