"""Tools on the real default model: it is held to the form of calls, whatever it would like to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from octavo import LLM, SamplingParams
from octavo.chat import ParsedMessage, plan_chat

USER = [{"role": "user", "content": "What is the weather in Paris?"}]
NODE: dict[str, Any] = {
    "type": "object", "properties": {"name": {"type": "string"}, "next": {"$ref": "#/$defs/Node"}},
    "required": ["name"], "additionalProperties": False,
}  # fmt: skip
PARAMETERS: dict[str, Any] = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "add": {"type": "object", "required": ["a", "b"],
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    "chain": {"type": "object", "properties": {"first": {"$ref": "#/$defs/Node"}}, "required": ["first"],
              "$defs": {"Node": NODE}},
    "now": {"type": "object", "properties": {}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"It is {name}", "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


def answers(llm: LLM, count: int = 1, **options: Any) -> list[ParsedMessage]:
    """`count` answers in one batch, with different seeds, at temperature 1."""
    tokens = options.pop("max_tokens", 64)
    plans = [
        plan_chat(llm.tokenizer, USER, SamplingParams(max_tokens=tokens, seed=seed), **{"tools": TOOLS, **options})
        for seed in range(count)
    ]
    outputs = llm.generate([plan.prompt for plan in plans], [plan.params for plan in plans], use_tqdm=False)
    messages = []
    for plan, output in zip(plans, outputs, strict=True):
        parser = plan.parser()
        parser.push(output.outputs[0].text)
        parser.finish()
        messages.append(parser.message)
        assert output.prompt_token_ids == plan.prompt["prompt_token_ids"]
    return messages


def check_calls(message: ParsedMessage) -> list[str]:
    for call in message.tool_calls:
        jsonschema.validate(json.loads(call.arguments), PARAMETERS[call.name])
    return [call.name for call in message.tool_calls]


def test_a_call_is_required(llm: LLM) -> None:
    for message in answers(llm, 8, tool_choice="required"):
        assert len(check_calls(message)) == 1
        assert message.content == ""


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_one_tool_is_named(llm: LLM, name: str) -> None:
    for message in answers(llm, 3, tool_choice=name, max_tokens=48):
        assert check_calls(message) == [name]
        assert message.content == ""


def test_several_calls(llm: LLM) -> None:
    for message in answers(llm, 4, tool_choice="required", parallel_tool_calls=True, max_tokens=96):
        assert check_calls(message)
        assert message.content == ""


def test_text_or_calls(llm: LLM) -> None:
    for message in answers(llm, 4, tool_choice="auto", max_tokens=48):
        assert message.content or check_calls(message)
        assert "<tool_call>" not in message.content


def test_json_or_calls(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    for tools in (TOOLS, None):
        for message in answers(llm, 3, tools=tools, json_schema=schema):
            if not check_calls(message):
                jsonschema.validate(json.loads(message.content), schema)


def test_a_stream_gives_what_the_whole_gives(llm: LLM) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": True}
    plan = plan_chat(llm.tokenizer, USER, SamplingParams(temperature=0, max_tokens=64), **options)
    stream, whole = plan.parser(), plan.parser()
    pieces = llm.stream(plan.prompt, plan.params)
    deltas = [stream.push(piece.text) for piece in pieces]
    stream.finish()
    whole.push(pieces.output.outputs[0].text)
    whole.finish()
    found = [[(call.name, call.arguments) for call in parser.message.tool_calls] for parser in (stream, whole)]
    assert found[0] == found[1]
    assert sum(map(bool, deltas)) > 3  # not all at the end


def test_a_result_goes_back(llm: LLM) -> None:
    """A whole round: a call, its result, an answer."""
    [message] = answers(llm, tool_choice="get_weather")
    [call] = message.tool_calls
    function = {"name": call.name, "arguments": call.arguments}
    history = [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 25 degrees."},
    ]
    plan = plan_chat(
        llm.tokenizer, history, SamplingParams(temperature=0, max_tokens=24), tools=TOOLS, tool_choice="none"
    )
    [output] = llm.generate(plan.prompt, plan.params)
    parser = plan.parser()
    parser.push(output.outputs[0].text)
    parser.finish()
    assert parser.message.content == output.outputs[0].text
    assert parser.message.content
