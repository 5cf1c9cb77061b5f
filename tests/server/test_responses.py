"""`/v1/responses`, by the `openai` client on the default model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from serving_helpers import CHAT, Program

WEATHER: Any = {
    "type": "function", "name": "get_weather", "description": "The weather in a city.", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def client(server: Program) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)


def asked(**more: Any) -> dict[str, Any]:
    return {"model": CHAT, "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 16, **more}


def test_text_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.create(**asked(instructions="Answer briefly.", metadata={"a": "b"}))
    assert whole.output_text
    assert whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 16
    assert whole.metadata == {"a": "b"}
    events = list(client.responses.create(**asked(instructions="Answer briefly."), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[2].item.content == []
    assert events[-1].response.output_text == whole.output_text


def test_the_clients_own_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(**asked()) as stream:
        for event in stream:
            last = event
        assert last.response.output_text


def test_a_tool_and_its_result(client: openai.OpenAI) -> None:
    ask: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    more = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 80}
    whole = client.responses.create(**asked(input=ask, **more))
    [call] = whole.output
    assert call.type == "function_call"
    assert "city" in json.loads(call.arguments)
    events = list(client.responses.create(**asked(input=ask, **more), stream=True))
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert (done.name, done.arguments) == (call.name, call.arguments)
    assert "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta") == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
    back = [*ask, call.model_dump(exclude_none=True), result]
    assert client.responses.create(**asked(input=back, tools=[WEATHER])).output


def test_structured_parse(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: str
        inhabitants: int

    found = client.responses.parse(**asked(text_format=City, max_output_tokens=80))
    assert isinstance(found.output_parsed, City)


def test_an_answer_can_come_back_as_input(client: openai.OpenAI) -> None:
    first = client.responses.create(**asked())
    items = [item.model_dump(exclude_none=True) for item in first.output]
    parts = [{"type": "input_text", "text": "Go on"}]
    history: list[Any] = [{"role": "user", "content": "Hello"}, *items, {"role": "user", "content": parts}]
    assert client.responses.create(**asked(input=history)).output_text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("previous_response_id", "resp_1"), ("conversation", "c"), ("background", True), ("store", True),
        ("include", ["message.output_text.logprobs"]), ("truncation", "auto"), ("max_tool_calls", 1),
        ("tools", [{"type": "web_search"}]), ("prompt", {"id": "p"}), ("service_tier", "flex"), ("unheard", 1),
        ("max_output_tokens", 0), ("max_output_tokens", 2**31), ("input", []),
        ("input", [{"type": "item_reference", "id": "x"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/"}]}]),
        ("reasoning", {"effort": "high"}), ("reasoning", {"summary": "auto"}), ("text", {"verbosity": "low"}),
        ("n", 2), ("top_logprobs", 5),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(client: openai.OpenAI, name: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**asked(extra_body={name: value}))
    assert str(refused.value.param).split(".")[0] == name
