"""Grammars, schemas and templates that explode, over HTTP: a 4xx within a second that says nothing of ours; a stream
beside it goes on; memory comes back."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_helpers import Beside, InProcess, in_process

LEAK = re.compile(r"Traceback|File \"|/tmp|/work|/root|site-packages|\.py\b|0x[0-9a-f]{6,}|octavo\.|octavo/")
SECONDS = 3.5
"""A second, on a machine that others use (`guard_worker.MOST_SECONDS`)."""
USER = {"role": "user", "content": "a"}
SLOW = {"type": "integer", "multipleOf": 1000003}
LOOP = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2


@pytest.fixture(scope="module")
def open_server(tiny_model: Path) -> Iterator[InProcess]:
    """One that takes templates."""
    settings = {"allow_request_templates": True}
    with in_process(tiny_model, settings=settings, num_blocks=256, block_size=16, max_num_seqs=16) as running:
        yield running


@pytest.fixture(scope="module")
def beside(open_server: InProcess) -> Iterator[Beside]:
    with Beside.of(open_server) as running:
        yield running


@pytest.fixture(autouse=True)
def stream_goes_on(beside: Beside) -> Iterator[None]:
    with beside.goes_on():
        yield


def asked(server: InProcess, path: str, body: dict[str, Any]) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    reply = httpx.post(server.url + path, json=body, timeout=60)
    return reply, time.monotonic() - began


def refused(server: InProcess, path: str, body: dict[str, Any], param: str) -> str:
    reply, took = asked(server, path, body)
    for _ in range(20):  # a machine that others use may have had no processor to tell by
        if reply.status_code != 429:
            break
        assert took < SECONDS
        assert reply.headers["retry-after"] == "1"
        reply, took = asked(server, path, body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert not LEAK.search(error["message"]), error
    assert len(error["message"]) < 1100
    assert took < SECONDS
    return str(error["message"])


def accepted(server: InProcess, **body: Any) -> str:
    reply, _ = asked(server, "/v1/completions", {"prompt": [70], "max_tokens": 8, **body})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


# -- 3: regexes and schemas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regex", ["(a+)+b", "a{1,1000000}", "(a{1,1000}){1,1000}", "(x+x+)+y", "(.*a){20}"])
def test_regexes_that_only_look_bad(open_server: InProcess, regex: str) -> None:
    """The library has no backtracking, and these cost it nothing."""
    accepted(open_server, guided_regex=regex)


def wide(size: int) -> dict[str, Any]:
    """A schema of about `size` characters that asks for much."""
    names = [f"key{number}" for number in range(size // 60)]
    return {"type": "object", "properties": {one: {"type": "string", "pattern": "^[a-z]{1,50}$"} for one in names}}


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "divisors": ({"guided_json": SLOW}, "guided_json"),
    "choices": ({"guided_choice": [f"choice {number}" for number in range(55_000)]}, "guided_choice"),
    "more than a megabyte": ({"guided_regex": "a" * 1_100_000}, "guided_regex"),
    "a megabyte of text": ({"guided_regex": "a" * 1_000_000}, "guided_regex"),
    "unbalanced": ({"structured_outputs": {"regex": "(" * 100_000}}, "structured_outputs"),
    "rules": ({"guided_grammar": "start: " + " ".join(f"r{number}?" for number in range(20_000)) + "\n" + "\n".join(
        f'r{number}: "a{number}"' for number in range(20_000))}, "guided_grammar"),
    "nothing but itself": ({"guided_json": {"$ref": "#"}}, "guided_json"),
    "without an end": ({"guided_json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
                       "guided_json"),
    "in a circle": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$defs": {
        "a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}}}, "response_format"),
    "a megabyte of schema": ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": wide(1_000_000)}}}, "response_format"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_explode(open_server: InProcess, name: str) -> None:
    body, param = FORMS[name]
    refused(open_server, "/v1/completions", {"prompt": [70], "max_tokens": 4, **body}, param)
    if param != "response_format":  # there it is part of the prompt, too
        refused(open_server, "/v1/chat/completions", {"messages": [USER], "max_tokens": 4, **body}, param)
    accepted(open_server, guided_choice=["yes"])


@pytest.mark.parametrize("schema", [SLOW, {"$ref": "#"}], ids=["divisors", "itself"])
def test_schemas_of_chats(open_server: InProcess, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [USER], "max_tokens": 4, "response_format": form}
    refused(open_server, "/v1/chat/completions", body, "response_format")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_that_explode(open_server: InProcess, path: str, choice: str) -> None:
    parameters = {"type": "object", "properties": {"x": SLOW}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    more = {} if path == "/tokenize" else {"tool_choice": choice, "max_tokens": 4}
    refused(open_server, path, {"messages": [USER], "tools": [tool], **more}, "tools")


def test_one_bad_tool_is_named(open_server: InProcess) -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {"x": {"type": kind}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    for path in ("/v1/chat/completions", "/tokenize"):
        body = {"messages": [USER], "tools": [tool("good", "string"), tool("odd", "nope")]}
        assert refused(open_server, path, body, "tools").startswith("tools[1] (odd): the parameters are not supported")


@pytest.mark.slow
def test_different_regexes_are_answered_one_by_one(open_server: InProcess) -> None:
    """10,000 of them, by hand, are in docs/reliability.md."""
    process = Path(f"/proc/{os.getpid()}/statm")
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"prompt": [70], "max_tokens": 2, "guided_regex": f"(a+{n})+b[0-9]{{1,{n + 1}}}"} for n in range(330)]
        first = list(pool.map(lambda body: asked(open_server, "/v1/completions", body)[0].status_code, bodies[:30]))
        before = int(process.read_text().split()[1])
        rest = list(pool.map(lambda body: asked(open_server, "/v1/completions", body)[0].status_code, bodies[30:]))
    assert {*first, *rest} == {200}
    grown = (int(process.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") / 1e6
    print(f"300 regexes: {grown:.0f} MB more")
    assert grown < 150


@pytest.mark.slow
def test_a_flood_of_slow_ones_does_not_shut_others_out(open_server: InProcess) -> None:
    """Each is answered or told to come again; meanwhile a quick one gets through."""
    def slow(number: int) -> int:
        body = {"prompt": [70], "max_tokens": 2, "guided_json": {**SLOW, "maximum": number}}
        return asked(open_server, "/v1/completions", body)[0].status_code

    with ThreadPoolExecutor(24) as pool:
        flood = [pool.submit(slow, number) for number in range(24)]
        time.sleep(0.5)
        began = time.monotonic()
        accepted(open_server, guided_regex="[a-c]{2}")
        took = time.monotonic() - began
        assert took < 24 * 0.15 + SECONDS
        assert not all(one.done() for one in flood)
        found = {one.result() for one in flood}
    assert found <= {400, 429}
    assert 429 in found  # no more than so many stand still


# -- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    "template",
    [
        LOOP, "{% for i in range(10**9) %}{% endfor %}", "{{ 'a' * 10**10 }}", "{{ ''.__class__.__mro__ }}", "{{ '",
        "{% for i in range(99999) %}{{ (range(99999) | list) | sort | first }}{% endfor %}",
        "{{ (messages | attr('x')).y }}",
        "{% set x = namespace(a='aaaaaaaa') %}{% for i in range(40) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a }}",
        "{% for i in range(30) %}{{ 'x' * 1000000 }}{% endfor %}", "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('no') }}{#" + "x" * 300_000 + "#}",
    ],
)  # fmt: skip
def test_templates_that_explode(open_server: InProcess, path: str, template: str) -> None:
    refused(open_server, path, {"messages": [USER], "chat_template": template}, "chat_template")


def test_a_template_may_refuse_messages(open_server: InProcess) -> None:
    body = {"messages": [USER], "chat_template": "{{ raise_exception('no users here') }}"}
    assert "no users here" in refused(open_server, "/v1/chat/completions", body, "messages")


@pytest.mark.parametrize("template", ["{{" * 120_000, "{%" * 120_000, "{{ tools" * 30_000, "{" * 250_000])
def test_reading_a_template_takes_no_time(open_server: InProcess, template: str) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"messages": [USER], "chat_template": template, "tools": [tool]}
    refused(open_server, "/v1/chat/completions", body, "chat_template")


def test_templates_and_tools(open_server: InProcess) -> None:
    """What a template of the model's own would be given: tools, the second try without a system message."""
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.content }}>{% endfor %}"
    )
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    body = {
        "messages": [USER], "chat_template": strict, "max_tokens": 30,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }  # fmt: skip
    reply, _ = asked(open_server, "/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    assert set(json.loads(reply.json()["choices"][0]["message"]["content"])) >= {"a"}


# -- the server's end ------------------------------------------------------------------------------------------------


def test_the_guard_ends_with_its_server(tiny_model: Path) -> None:
    with in_process(tiny_model, num_blocks=64, block_size=16) as running:
        accepted(running, guided_regex="[ab]")
        pid = running.app.state.server.models.guard.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
