"""Tools and structured output of `ChatOctavo`, enforced by grammars: what the default model says is always valid, also
at temperature 1."""

from __future__ import annotations

import asyncio
import enum
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_octavo import ChatOctavo
from langchain_octavo.schemas import is_recursive, json_schema
from langchain_recorder import at_rest
from langchain_tests.utils.stream_lifecycle import assert_valid_event_stream
from octavo import StructuredOutputsParams
from octavo.chat import closed
from octavo.errors import RequestError
from pydantic import BaseModel, Field

pytestmark = pytest.mark.filterwarnings("ignore:.*is in beta")


@tool
def weather(city: str, days: int = 1) -> str:
    """Forecast of the weather in a city."""
    return f"sunny in {city} for {days} days"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatOctavo]:
    chat = ChatOctavo(temperature=1.0, seed=1, max_tokens=100)
    yield chat
    chat.close()


def valid_call(call: Any) -> bool:
    arguments = call["args"]
    if call["name"] == "add":
        return set(arguments) == {"a", "b"} and all(type(value) is int for value in arguments.values())
    return call["name"] == "weather" and "city" in arguments and set(arguments) <= {"city", "days"}


# -- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["any", "required", True, "add", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_must_come_comes(chat: ChatOctavo, choice: Any) -> None:
    bound = chat.bind_tools([weather, add], tool_choice=choice)
    messages = bound.batch(["What is 3 + 4?", "Hello", "Weather in Oslo?"])
    for message in messages:
        assert message.content == ""
        assert message.response_metadata["finish_reason"] == "tool_calls"
        assert message.tool_calls
        assert all(map(valid_call, message.tool_calls))
        assert all(call["id"] for call in message.tool_calls)
        if choice not in ("any", "required", True):
            assert [call["name"] for call in message.tool_calls] == ["add"]


@pytest.mark.parametrize("choice", ["none", "auto", None, False])
def test_a_call_that_need_not_come(chat: ChatOctavo, choice: Any) -> None:
    bound = chat.bind_tools([weather, add], tool_choice=choice)
    message = bound.invoke("Write a word.")
    assert message.content or message.tool_calls
    assert all(map(valid_call, message.tool_calls))
    if choice == "none":
        assert not message.tool_calls
        assert message.content == chat.invoke("Write a word.").content, "it was told of no tools"


def test_the_default_model_calls_by_itself_and_answers_with_the_result() -> None:
    chat = ChatOctavo(temperature=0, max_tokens=60).bind_tools([weather])
    question = HumanMessage("What is the weather in San Francisco, CA?")
    call = chat.invoke([question])
    (made,) = call.tool_calls
    assert made["name"] == "weather"
    result = weather.invoke(made)
    assert isinstance(result, ToolMessage)
    answer = chat.invoke([question, call, result])
    assert answer.content
    assert not answer.tool_calls


def test_parallel_calls_and_their_chunks(chat: ChatOctavo) -> None:
    # more tokens than one call has, so that there must be a second
    several = {"parallel_tool_calls": True, "min_tokens": 80, "max_tokens": 160}
    bound = chat.bind_tools([weather, add], tool_choice="any", **several)
    whole = bound.invoke("What is 3 + 4, and what is the weather in Oslo?")
    assert len(whole.tool_calls) > 1
    assert len({call["id"] for call in whole.tool_calls}) == len(whole.tool_calls)
    chunks = list(bound.stream("What is 3 + 4, and what is the weather in Oslo?"))
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]  # type: ignore[attr-defined]
    assert len(pieces) > 2 * len(whole.tool_calls), "arguments come piece by piece"
    total: AIMessageChunk = sum(chunks[1:], chunks[0])  # type: ignore[assignment]
    assert [(call["name"], call["args"]) for call in total.tool_calls] == [
        (call["name"], call["args"]) for call in whole.tool_calls
    ]
    for index in range(len(whole.tool_calls)):
        own = [piece for piece in pieces if piece["index"] == index]
        assert own[0]["id"]
        assert own[0]["name"]
        assert not any(piece["id"] or piece["name"] for piece in own[1:])
        json.loads("".join(piece["args"] or "" for piece in own))
    one = chat.bind_tools([weather, add], tool_choice="any", parallel_tool_calls=False)
    assert len(one.invoke("What is 3 + 4, and 5 + 6?").tool_calls) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_streamed_calls_are_the_same_in_every_form(asynchronous: bool, version: str) -> None:
    chat = ChatOctavo(temperature=0, max_tokens=60, output_version=version)
    bound = chat.bind_tools([weather, add], tool_choice="any", parallel_tool_calls=True)
    question = "What is 3 + 4?"

    async def read() -> list[Any]:
        return [chunk async for chunk in bound.astream(question)]

    whole = bound.invoke(question)
    chunks = asyncio.run(read()) if asynchronous else list(bound.stream(question))
    total = sum(chunks[1:], chunks[0])
    assert [call["args"] for call in total.tool_calls] == [call["args"] for call in whole.tool_calls]
    assert [block["type"] for block in total.content_blocks] == ["tool_call"] * len(whole.tool_calls)
    assert [block["args"] for block in whole.content_blocks] == [call["args"] for call in whole.tool_calls]
    assert total.response_metadata["finish_reason"] == "tool_calls"


def test_the_event_protocol_has_calls(chat: ChatOctavo) -> None:
    bound = chat.bind_tools([weather, add], tool_choice="any", parallel_tool_calls=True)
    stream = bound.stream_events("What is 3 + 4?", version="v3")  # type: ignore[call-overload]
    events = list(stream)
    assert_valid_event_stream(events)
    deltas = [event for event in events if event["event"] == "content-block-delta"]
    assert {event["delta"]["type"] for event in deltas} == {"tool-call-delta"}
    message: AIMessage = stream.output
    assert message.tool_calls
    assert all(map(valid_call, message.tool_calls))
    assert [block["type"] for block in message.content_blocks] == ["tool_call"] * len(message.tool_calls)


def test_reasoning_is_a_block_of_its_own() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n<think>\n' }}{# </think> #}"
    )
    form = r"[a-z]{1,8}\n</think>\n\n[A-Z]{1,8}"
    options: dict[str, Any] = {
        "temperature": 0, "max_tokens": 40, "chat_template": template,
        "structured_outputs": StructuredOutputsParams(regex=form),
    }  # fmt: skip
    chat = ChatOctavo(**options)
    message = chat.invoke("Think.")
    reasoning, text = message.content_blocks
    assert (reasoning["type"], text["type"]) == ("reasoning", "text")
    assert re.fullmatch(r"[a-z]{1,8}\s*", str(reasoning["reasoning"]))  # type: ignore[typeddict-item]
    assert re.fullmatch("[A-Z]{1,8}", str(message.content))
    chunks = list(chat.stream("Think."))
    total: AIMessageChunk = sum(chunks[1:], chunks[0])  # type: ignore[assignment]
    assert total.content_blocks == message.content_blocks
    blocks = list(ChatOctavo(**options, output_version="v1").stream("Think."))
    whole: AIMessageChunk = sum(blocks[1:], blocks[0])  # type: ignore[assignment]
    assert [block["type"] for block in whole.content_blocks] == ["reasoning", "text"]
    stream = chat.stream_events("Think.", version="v3")
    assert_valid_event_stream(list(stream))
    assert str(stream.reasoning) == reasoning["reasoning"]  # type: ignore[typeddict-item]
    again = chat.invoke([HumanMessage("Think."), message, HumanMessage("Again.")])
    assert again.content, "an answer with reasoning goes back into a conversation"


def test_broken_tools_are_named_before_anything_runs(chat: ChatOctavo) -> None:
    steps = chat.stats().steps
    for broken, words in (
        ([3], "tool 3"),
        ([{"name": "f", "parameters": {"type": "array"}}], "parameters of tool f"),
        ([{"type": "web_search"}], "web_search"),
        ([add, add], "add"),
        ([{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "strang"}}}}], "strang"),
    ):
        with pytest.raises(RequestError, match=words) as raised:
            chat.bind_tools(broken, tool_choice="any").invoke("Hello")  # type: ignore[arg-type]
        assert raised.value.field == "tools"
    with pytest.raises(RequestError, match="weather") as raised:
        chat.bind_tools([weather], tool_choice="wether")
    assert raised.value.field == "tool_choice"
    assert chat.stats().steps == steps
    assert chat.bind_tools([add], tool_choice="add").invoke("1 + 1").tool_calls


# -- structured output -----------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(BaseModel):
    width: int = Field(ge=0, le=100)
    unit: Literal["cm", "inch"]


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: float


class Thing(BaseModel):
    """A thing of the house."""

    name: str = Field(pattern="^[a-z]{3,10}$")
    colour: Colour
    sizes: list[Size] = Field(min_length=1, max_length=2)
    shape: Circle | None = None


class Tree(BaseModel):
    """A family tree."""

    value: int = Field(ge=0, le=9)
    children: list[Tree] = Field(default=[], max_length=2)


class Person(TypedDict):
    """A person."""

    name: Annotated[str, ..., "the name"]
    age: Annotated[int, ..., "in years"]


PLAIN = {"title": "Point", "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
METHODS = ["json_schema", "function_calling", "json_mode"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", [Thing, Tree, Person, PLAIN, convert_to_openai_tool(Person)])
def test_answers_always_validate(chat: ChatOctavo, schema: Any, method: Any) -> None:
    answers = chat.with_structured_output(schema, method=method).batch(
        [f"Describe one, number {number}." for number in range(4)]
    )
    for answer in answers:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            assert isinstance(answer, schema)
        elif schema is PLAIN:
            assert type(answer["x"]) is int
            assert set(answer) == {"x"}
        else:
            assert set(answer) == {"name", "age"}
            assert type(answer["age"]) is int
    assert at_rest(chat.stats())


@pytest.mark.parametrize("method", METHODS)
def test_structured_answers_stream_and_end_whole(chat: ChatOctavo, method: Any) -> None:
    parts = list(chat.with_structured_output(Person, method=method).stream("Who is Ada?"))
    assert len(parts) > 1
    assert set(parts[-1]) == {"name", "age"}

    async def read() -> Any:
        return [part async for part in chat.with_structured_output(Thing, method=method).astream("A cup")][-1]

    assert isinstance(asyncio.run(read()), Thing)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strict", [None, True, False])
def test_include_raw(chat: ChatOctavo, method: Any, strict: bool | None) -> None:
    found = chat.with_structured_output(Size, method=method, include_raw=True, strict=strict).invoke("How wide?")
    assert isinstance(found["parsed"], Size)
    assert found["parsing_error"] is None
    raw = found["raw"]
    assert isinstance(raw, AIMessage)
    said = raw.tool_calls[0]["args"] if method == "function_calling" else json.loads(str(raw.content))
    assert Size.model_validate(said) == found["parsed"]


async def test_a_form_that_is_new_is_kept_from_the_first_token(chat: ChatOctavo) -> None:
    """It is compiled beside the event loop, and nothing is said before it is known."""
    async for chunk in chat.astream("Say.", structured_outputs=StructuredOutputsParams(regex="7x[ab]{3}")):
        assert set(chunk.text) <= set("7xab")
    stream = await chat.astream_events(
        "Say.", version="v3", structured_outputs=StructuredOutputsParams(regex="8x[ab]{3}")
    )
    assert re.fullmatch("8x[ab]{3}", str(await stream.text))


def test_any_json_object(chat: ChatOctavo) -> None:
    assert isinstance(chat.with_structured_output(method="json_mode").invoke("Give me JSON."), dict)


def test_few_tokens_still_make_a_whole_answer() -> None:
    chat = ChatOctavo(temperature=1.0, seed=4)
    answers = chat.with_structured_output(Person).batch(["Who?"] * 3, max_tokens=24)
    assert all(set(answer) == {"name", "age"} for answer in answers)


def test_what_is_no_schema_is_named(chat: ChatOctavo) -> None:
    for schema, options, field in (
        (3, {}, "schema"), ({}, {}, "schema"), ({"a": 1}, {}, "schema"), (None, {}, "schema"), (int, {}, "schema"),
        (Size, {"method": "xml"}, "method"),
    ):  # fmt: skip
        with pytest.raises(RequestError) as raised:
            chat.with_structured_output(schema, **options)  # type: ignore[arg-type]
        assert raised.value.field == field
    unsound = {"title": "X", "type": "object", "properties": {"x": {"type": "string", "pattern": "(?=a)b"}}}
    with pytest.raises(RequestError):
        chat.with_structured_output(unsound).invoke("Hello")
    assert chat.invoke("Hello").content


def test_schemas_are_closed_and_keep_their_references() -> None:
    assert is_recursive(Tree.model_json_schema())
    assert not is_recursive(Thing.model_json_schema())
    assert json_schema(Tree) == Tree.model_json_schema()
    whole = closed(Thing.model_json_schema())
    assert whole["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for name, part in whole["$defs"].items() if name != "Colour")
    free = {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}}
    assert closed(free) == free
    together = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert closed(together) == together
