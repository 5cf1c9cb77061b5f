"""Structured outputs: what they promise, on the real default model. (That a sequence's grammar survives preemption,
failed steps and overlap is part of `test_traces.py` and `test_overlap.py`.)"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from octavo import LLM, AsyncLLM, RequestError, RequestFailedError, SamplingParams, StructuredOutputsParams
from octavo.decode.grammar import Grammar

NODE = {
    "type": "object", "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"},
    {"type": "null"}]}}, "required": ["value", "next"], "additionalProperties": False,
}  # fmt: skip
TREE = {
    "type": "object", "properties": {"name": {"type": "string"}, "children": {"type": "array", "items":
    {"$ref": "#/$defs/tree"}}}, "required": ["name", "children"], "additionalProperties": False,
}  # fmt: skip
PERSON = {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0,
    "maximum": 120}}, "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip


def fields(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip


TEXT, NUMBER = {"type": "string"}, {"type": "number"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": PERSON,
    "nested": fields(person=PERSON, address=fields(street=TEXT, city=fields(name=TEXT, code=TEXT))),
    "enum": fields(colour={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2, 3, None]}),
    "array of text": fields(words={"type": "array", "items": TEXT}),
    "array of objects": fields(people={"type": "array", "items": PERSON}),
    "array of a length": fields(three={"type": "array", "items": NUMBER, "minItems": 3, "maxItems": 3}),
    "tuple": {"type": "array", "prefixItems": [TEXT, {"type": "integer"}, {"type": "boolean"}], "items": False,
              "minItems": 3},
    "union": fields(value={"anyOf": [TEXT, {"type": "integer"}, PERSON, {"type": "null"}]}),
    "pattern": fields(plate={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,6}$"},
                      mail={"type": "string", "pattern": "^[a-z]+@[a-z]+\\.(com|org)$"}),
    "lengths": fields(short={"type": "string", "maxLength": 5}, long={"type": "string", "minLength": 30}),
    "list, recursive": {**NODE, "$defs": {"node": NODE}},
    "tree, recursive": {**TREE, "$defs": {"tree": TREE}},
    "optional keys": {"type": "object", "properties": {"a": TEXT, "b": PERSON, "c": NUMBER}, "required": ["b"],
                      "additionalProperties": False},
    "free keys": {"type": "object", "additionalProperties": {"type": "integer"}},
    "const": fields(kind={"const": "point"}, x=NUMBER, y=NUMBER),
    "dates": fields(day={"type": "string", "format": "date"}, at={"type": "string", "format": "date-time"}),
    "tagged union": {"anyOf": [fields(kind={"const": "circle"}, radius=NUMBER),
                               fields(kind={"const": "box"}, width=NUMBER, height=NUMBER)]},
    "matrix": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 2}},
    "many keys": fields(**{f"a long name of a key, number {n}": TEXT for n in range(8)}),
    "bounds": fields(share={"type": "number", "minimum": 0, "maximum": 1}, count={"type": "integer", "minimum": 1000}),
}  # fmt: skip
"""Nested, enums, arrays, unions, patterns, recursive: 20."""


def params(form: StructuredOutputsParams | None, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 160, "structured_outputs": form} | options)


def of_schema(schema: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=schema)


@pytest.fixture(scope="module")
def llm(default_model: Any) -> Iterator[LLM]:
    with LLM(str(default_model)) as llm:
        yield llm


def test_200_of_200_validate(llm: LLM) -> None:
    """At temperature 1, ten of each schema, all in one batch, with room for 160 tokens: where a 135M model goes on
    and on, the output is closed in time."""
    work = [(name, seed) for name in SCHEMAS for seed in range(10)]
    prompts = [[{"role": "user", "content": f"Invent an example ({name}). Answer in JSON."}] for name, _ in work]
    each = [params(of_schema(SCHEMAS[name]), seed=seed) for name, seed in work]
    outputs = llm.chat(prompts, each)
    valid = 0
    for (name, seed), output in zip(work, outputs, strict=True):
        value = json.loads(output.text)
        jsonschema.validate(value, SCHEMAS[name], cls=jsonschema.Draft202012Validator)
        assert output.outputs[0].finish_reason == "stop", (name, seed, output.text)
        valid += 1
    assert valid == 200
    assert len({output.text for output in outputs}) > 100, "they hardly differ: nothing was sampled"


@pytest.mark.parametrize("name", ["nested", "list, recursive", "pattern", "array of objects"])
def test_little_room_is_enough_if_anything_fits(llm: LLM, name: str) -> None:
    """From the length of the way out on, every length validates; what cannot fit ends with a plain "length"."""
    form = of_schema(SCHEMAS[name])
    grammar = llm.engine.grammars.compile(form)
    way = grammar.ways.find(grammar._first)
    assert way
    for room in (len(way), len(way) + 1, len(way) + 2, len(way) + 9, 2 * len(way)):
        for output in llm.generate(["Example: "] * 3, [params(form, max_tokens=room, seed=seed) for seed in range(3)]):
            jsonschema.validate(json.loads(output.text), SCHEMAS[name])
    (output,) = llm.generate("Example: ", params(form, max_tokens=3))
    assert output.outputs[0].finish_reason == "length"


def test_regex_choice_and_grammars(llm: LLM) -> None:
    forms = {
        "regex": (StructuredOutputsParams(regex=r"[0-9]{3}-(abc|xyz)+!"), r"[0-9]{3}-(abc|xyz)+!"),
        "choice": (StructuredOutputsParams(choice=["yes", "no", 'a "quoted" one']), 'yes|no|a "quoted" one'),
        "lark": (StructuredOutputsParams(grammar='start: pair ("," pair)*\npair: /[a-z]/ "=" /[0-9]+/'),
                 "[a-z]=[0-9]+(,[a-z]=[0-9]+)*"),
        "gbnf": (StructuredOutputsParams(grammar='root ::= word+\nword ::= "ab" | "cd"'), "(ab|cd)+"),
    }  # fmt: skip
    work = [(form, pattern, seed) for form, pattern in forms.values() for seed in range(5)]
    outputs = llm.generate(["Go: "] * len(work), [params(form, seed=seed) for form, _, seed in work])
    for (form, pattern, _), output in zip(work, outputs, strict=True):
        assert re.fullmatch(pattern, output.text), (form, output.text)
    (output,) = llm.generate("Go: ", params(StructuredOutputsParams(json_object=True)))
    assert isinstance(json.loads(output.text), dict)


def test_neighbours_are_not_touched(llm: LLM) -> None:
    """Rows without a grammar make the same tokens beside rows that have one."""
    plain = params(None, temperature=0.9, seed=5, max_tokens=40)
    (alone,) = llm.generate("The weather in spring", plain)
    mixed = llm.generate(
        ["Example: ", "The weather in spring", "Example: "],
        [params(of_schema(PERSON), seed=1), plain, params(StructuredOutputsParams(choice=["a", "b"]))],
    )
    assert mixed[1].outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_stream_joins_to_the_text_and_the_last_token_is_text(llm: LLM) -> None:
    stream = llm.stream("Example: ", params(of_schema(PERSON), seed=2))
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == stream.output.text
    assert json.loads(stream.output.text).keys() == {"name", "age"}
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].stop_reason is None


def test_log_probabilities_are_those_of_the_raw_logits(llm: LLM) -> None:
    form = StructuredOutputsParams(choice=["zebra zebra"])
    (output,) = llm.generate("The capital of France is", params(form, logprobs=1))
    first = output.outputs[0].logprobs[0]  # type: ignore[index]
    chosen = first[output.outputs[0].token_ids[0]]
    assert chosen.logprob < -5
    assert (chosen.rank or 0) > 100


def test_n_outputs_walk_by_themselves(llm: LLM) -> None:
    (output,) = llm.generate("Example: ", params(of_schema(PERSON), n=4, seed=3))
    for choice in output.outputs:
        jsonschema.validate(json.loads(choice.text), PERSON)
    assert len({choice.text for choice in output.outputs}) > 1


BAD: dict[str, dict[str, Any]] = {
    "none": {},
    "two": {"json": PERSON, "regex": "a"},
    "schema is a list": {"json": [1]},
    "schema is no JSON": {"json": "{"},
    "schema holds an object": {"json": {"const": object()}},
    "regex is a number": {"regex": 3},
    "regex is empty": {"regex": ""},
    "choice is a string": {"choice": "ab"},
    "choice is empty": {"choice": []},
    "choice holds a number": {"choice": ["a", 1]},
    "too long": {"regex": "a" * (1 << 20) + "a"},
    "json_object is a string": {"json_object": "yes"},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_form_is_refused_when_it_is_made(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(**BAD[name])
    assert caught.value.field == "structured_outputs"


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"json": {"type": "array", "uniqueItems": True}},
    "nowhere": {"json": {"$ref": "#/$defs/nowhere"}},
    "look": {"regex": "(?=a)b"},
    "lexer": {"grammar": "start: %"},
    "unsatisfiable": {"json": {"type": "integer", "minimum": 3, "maximum": 2}},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_the_library_lacks_is_an_error_before_the_first_token(llm: LLM, name: str) -> None:
    bad = params(StructuredOutputsParams(**UNSUPPORTED[name]))
    steps = llm.stats().steps
    with pytest.raises(RequestError) as caught:
        llm.generate("Example: ", bad)
    assert caught.value.field == "structured_outputs"
    assert name in str(caught.value).lower() or name in str(caught.value)
    assert llm.stats().steps == steps
    assert llm.generate("Hello", SamplingParams(max_tokens=2))[0].finished


def test_not_a_form() -> None:
    with pytest.raises(RequestError, match="StructuredOutputsParams"):
        SamplingParams(structured_outputs={"json": {}})  # type: ignore[arg-type]


def test_equal_forms_are_compiled_once(llm: LLM) -> None:
    grammars = llm.engine.grammars
    one = grammars.compile(StructuredOutputsParams(json={"type": "boolean", "title": "once"}))
    assert grammars.compile(StructuredOutputsParams(json='{"type": "boolean", "title": "once"}')) is one


def test_a_grammar_that_fails_ends_its_request_alone(llm: LLM) -> None:
    """As when a limit of the library is met on the way."""

    class Broken:
        def accept(self, token: int) -> bool:
            return False

        def allowed(self, left: int) -> Any:
            raise RequestFailedError("too complex")

    class BreaksOnce:
        size, seconds = 0, 0.0

        def start(self) -> Any:
            return Broken()

    form = StructuredOutputsParams(regex="broken")
    llm.engine.grammars._kept[form] = BreaksOnce()  # type: ignore[assignment]
    try:
        outputs = llm.generate(
            ["Hello", "Hello", "Example: "],
            [params(None, max_tokens=9), params(form), params(of_schema(PERSON))], return_exceptions=True,
        )  # fmt: skip
    finally:
        del llm.engine.grammars._kept[form]
    assert outputs[0].finished
    assert isinstance(outputs[1], RequestFailedError)
    jsonschema.validate(json.loads(outputs[2].text), PERSON)
    assert llm.stats().blocks_used == 0


async def test_compiling_does_not_hold_the_event_loop(default_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new grammar is compiled in a thread, whether streamed or not; what is cancelled meanwhile never runs."""
    threads: list[threading.Thread] = []
    compile_first = Grammar.__init__

    def slow(self: Grammar, *args: Any) -> None:
        threads.append(threading.current_thread())
        time.sleep(0.3)
        compile_first(self, *args)

    monkeypatch.setattr(Grammar, "__init__", slow)
    async with await AsyncLLM.create(str(default_model)) as llm:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        (output,) = await llm.generate("Go: ", params(StructuredOutputsParams(choice=["new one"])))
        assert output.text == "new one"
        stream = llm.stream("Go: ", params(StructuredOutputsParams(choice=["b"])))
        assert "".join([piece.text async for piece in stream]) == "b"
        assert ticks > 20
        assert threading.main_thread() not in threads
        stream = llm.stream("Go: ", params(StructuredOutputsParams(choice=["never"])))
        stream.close()
        assert [piece.finish_reason async for piece in stream] == ["abort"]
        with pytest.raises(RequestError):
            await llm.generate("Go: ", params(StructuredOutputsParams(regex="(?=x)")))
        refused = llm.stream("Go: ", params(StructuredOutputsParams(regex="(?=y)")))
        with pytest.raises(RequestError):
            await anext(refused)
        assert [piece.finish_reason async for piece in refused] == ["abort"]  # who asks again does not wait for ever
        cancelled = llm.stream("Go: ", params(StructuredOutputsParams(choice=["cancelled"])))
        waiting = asyncio.create_task(anext(cancelled))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [piece.finish_reason async for piece in cancelled] == ["abort"]
        ticking.cancel()
        assert llm.stats().blocks_used == 0
