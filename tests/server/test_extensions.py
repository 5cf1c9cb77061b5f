"""vLLM's fields, under vLLM's names, and what else a request may say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_helpers import InProcess, in_process

TEMPLATE = (
    "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    "{% if add_generation_prompt %}:{{ mood }}{% endif %}"
)


@pytest.fixture(scope="module")
def open_to_templates(tiny_model: Path) -> Iterator[InProcess]:
    with in_process(tiny_model, settings={"allow_request_templates": True}, num_blocks=64, block_size=16) as running:
        yield running


def post(server: InProcess, path: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(f"{server.url}{path}", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def chunks(server: InProcess, path: str, **body: Any) -> list[dict[str, Any]]:
    found = []
    with httpx.stream("POST", f"{server.url}{path}", json={**body, "stream": True}, timeout=30) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        found.append(json.loads(line.removeprefix("data: ")))
    return found


def text_of(server: InProcess, ids: list[int]) -> str:
    return str(post(server, "/detokenize", tokens=ids)["prompt"])


def test_tokens_there_and_back(tiny: InProcess) -> None:
    found = post(tiny, "/tokenize", prompt="hello world", add_special_tokens=False, return_token_strs=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert "".join(found["token_strs"]) == "hello world"
    assert text_of(tiny, found["tokens"]) == "hello world"
    assert found["max_model_len"] == tiny.llm.engine.limits.max_model_len


def test_token_ids_come_back(tiny: InProcess) -> None:
    asked: dict[str, Any] = {
        "prompt": [70, 71],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    choice = post(tiny, "/v1/completions", **asked)["choices"][0]
    assert choice["prompt_token_ids"] == [70, 71]
    assert len(choice["token_ids"]) == 6
    streamed = chunks(tiny, "/v1/completions", **asked)
    assert streamed[0]["choices"][0]["prompt_token_ids"] == [70, 71]
    assert [token for one in streamed for token in one["choices"][0].get("token_ids", ())] == choice["token_ids"]
    chat = post(
        tiny,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "a"}],
        max_tokens=3,
        return_token_ids=True,
        ignore_eos=True,
    )
    assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    assert len(chat["choices"][0]["token_ids"]) == 3


def test_a_prompt_is_cut_from_the_left(tiny: InProcess) -> None:
    asked: dict[str, Any] = {"max_tokens": 1, "return_token_ids": True}
    for prompt in ([70, 71, 72, 73], [[70, 71, 72, 73]]):
        choice = post(tiny, "/v1/completions", prompt=prompt, truncate_prompt_tokens=2, **asked)["choices"][0]
        assert choice["prompt_token_ids"] == [72, 73]
    long = post(tiny, "/v1/completions", prompt=[70] * 1000, truncate_prompt_tokens=-1, **asked)
    assert long["usage"]["prompt_tokens"] == tiny.llm.engine.limits.max_model_len - 1


def test_echo_streamed(tiny: InProcess) -> None:
    whole = post(tiny, "/v1/completions", prompt="hello", echo=True, max_tokens=5, temperature=0, n=2)
    streamed = chunks(tiny, "/v1/completions", prompt="hello", echo=True, max_tokens=5, temperature=0, n=2)
    for choice in whole["choices"]:
        pieces = [one["choices"][0]["text"] for one in streamed if one["choices"][0]["index"] == choice["index"]]
        assert "".join(pieces) == choice["text"]
        assert choice["text"].startswith("hello")


def test_usage_in_every_chunk(tiny: InProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = chunks(tiny, "/v1/completions", prompt=[70], max_tokens=5, ignore_eos=True, stream_options=options)
    made = [one["usage"]["completion_tokens"] for one in found]
    assert made == sorted(made)
    assert made[-1] == 5
    assert all(one["usage"]["prompt_tokens"] == 1 for one in found)


def test_scores_of_the_prompt(tiny: InProcess) -> None:
    choice = post(tiny, "/v1/completions", prompt=[70, 71, 72], prompt_logprobs=2, max_tokens=1)["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert [str(token) in entry for token, entry in zip((71, 72), rest, strict=True)] == [True, True]
    chat = post(
        tiny, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], prompt_logprobs=1, max_tokens=1
    )
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_tokens_by_their_ids(tiny: InProcess) -> None:
    asked: dict[str, Any] = {
        "prompt": [70],
        "max_tokens": 2,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    choice = post(tiny, "/v1/completions", **asked)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_a_request_id_of_the_clients(tiny: InProcess) -> None:
    reply = httpx.post(f"{tiny.url}/v1/completions", json={"prompt": [70], "max_tokens": 1, "request_id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    assert reply.json()["id"] == "cmpl-mine-1"


def test_ends(tiny: InProcess) -> None:
    base: dict[str, Any] = {
        "prompt": [70],
        "max_tokens": 12,
        "temperature": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    choice = post(tiny, "/v1/completions", **base)["choices"][0]
    third = choice["token_ids"][2]
    place = choice["token_ids"].index(third)
    ended = post(tiny, "/v1/completions", **base, stop_token_ids=[third])["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert ended["stop_reason"] == third
    assert ended["token_ids"] == choice["token_ids"][: place + 1]
    late = post(tiny, "/v1/completions", **base, stop_token_ids=[third], min_tokens=10)["choices"][0]
    assert len(late["token_ids"]) >= 10
    never = post(tiny, "/v1/completions", **base, bad_words=[text_of(tiny, [third])])["choices"][0]
    assert third not in never["token_ids"]
    only = post(tiny, "/v1/completions", **base, allowed_token_ids=[90, 91])["choices"][0]
    assert set(only["token_ids"]) <= {90, 91}


def test_templates_where_the_operator_allows_them(open_to_templates: InProcess) -> None:
    def prompt(path: str = "/v1/chat/completions", **more: Any) -> str:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        body = {"messages": messages, "chat_template": TEMPLATE, "chat_template_kwargs": {"mood": "x"}, **more}
        if path == "/tokenize":
            return text_of(open_to_templates, post(open_to_templates, path, **body)["tokens"])
        found = post(open_to_templates, path, **body, max_tokens=1, return_token_ids=True)
        return text_of(open_to_templates, found["prompt_token_ids"])

    for path in ("/v1/chat/completions", "/tokenize"):
        assert prompt(path) == "<a><b>:x"
        assert prompt(path, add_generation_prompt=False) == "<a><b>"
        assert prompt(path, continue_final_message=True, add_generation_prompt=False) == "<a><b"
    for template in ("{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}{% endfor %}", "{{ '"):
        reply = httpx.post(
            f"{open_to_templates.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}], "chat_template": template}, timeout=30,
        )  # fmt: skip
        assert reply.status_code == 400
        assert "0x" not in reply.text


def test_forms_exclude_each_other(tiny: InProcess) -> None:
    body = {"prompt": "a", "guided_choice": ["a"], "guided_regex": "a"}
    reply = httpx.post(f"{tiny.url}/v1/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "guided_choice"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {}}}])
def test_a_response_format_excludes_other_forms(tiny: InProcess, path: str, form: dict[str, object]) -> None:
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    reply = httpx.post(f"{tiny.url}{path}", json={**asked, "response_format": form, "guided_regex": "a"})
    assert reply.status_code == 400, reply.text


def test_a_server_that_ends_takes_no_grammars_from_another(tiny_model: Path) -> None:
    """Both of one process and one engine."""
    settings = {"num_blocks": 64, "block_size": 16}
    asked = {"prompt": "a", "max_tokens": 4}
    with in_process(tiny_model, **settings) as first:
        with in_process(tiny_model, **settings) as second:
            assert first.llm.engine is second.llm.engine
            assert post(second, "/v1/completions", guided_choice=["one"], **asked)["choices"][0]["text"] == "one"
        assert post(first, "/v1/completions", guided_choice=["two"], **asked)["choices"][0]["text"] == "two"


def test_text_leaves_another_form_as_it_is(tiny: InProcess) -> None:
    given = {"response_format": {"type": "text"}, "guided_choice": ["ab"]}
    assert post(tiny, "/v1/completions", prompt="a", **given)["choices"][0]["text"] == "ab"


def test_beams(tiny: InProcess) -> None:
    found = post(tiny, "/v1/completions", prompt=[70], use_beam_search=True, n=3, beam_width=4, max_tokens=4)
    assert len(found["choices"]) == 3
    streamed = chunks(tiny, "/v1/completions", prompt=[70], use_beam_search=True, n=1, beam_width=4, max_tokens=4)
    assert "".join(one["choices"][0]["text"] for one in streamed) == found["choices"][0]["text"]
