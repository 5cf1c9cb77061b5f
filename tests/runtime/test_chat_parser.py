"""`ChatParser`: what a model writes to text, thoughts and calls, wherever it is cut into pieces."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
from chat_templates import TEMPLATES, tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo import SamplingParams
from octavo.chat import ChatParser, ChatPlan, ReasoningDelta, TextDelta, ToolCallDelta, plan_chat

USER = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "x": {}}}

Result = tuple[str, str, list[tuple[str, str]]]


@lru_cache
def plan_for(form: str, **options: Any) -> ChatPlan:
    tools = None if options.get("tool_choice") == "no tools" else TOOLS
    options = {name: value for name, value in options.items() if value != "no tools"}
    schema = SCHEMA if options.pop("schema", False) else None
    return plan_chat(tokenizer_for(form), USER, SamplingParams(), tools=tools, json_schema=schema, **options)


def read(parser: ChatParser, pieces: list[str]) -> Result:
    """The deltas joined; they must agree with `parser.message`."""
    text = reasoning = ""
    calls: list[list[str]] = []
    for deltas in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        for delta in deltas:
            if isinstance(delta, TextDelta):
                text += delta.text
                assert delta.text
            elif isinstance(delta, ReasoningDelta):
                reasoning += delta.text
                assert delta.text
            else:
                if delta.index == len(calls):
                    assert delta.id
                    assert delta.name
                    calls.append([delta.id, delta.name, ""])
                else:
                    assert delta.id is delta.name is None
                    assert delta.index == len(calls) - 1
                calls[-1][2] += delta.arguments
    message = parser.message
    assert message.content == text
    assert message.reasoning == (reasoning or None)
    assert [[call.id, call.name, call.arguments] for call in message.tool_calls] == calls
    assert all(call[0].startswith("call_") for call in calls)
    assert len({call[0] for call in calls}) == len(calls)
    return text, reasoning, [(name, arguments) for _, name, arguments in calls]


def whole(form: str, text: str, **options: Any) -> Result:
    """What `text` gives, after it was read in one piece and letter by letter."""
    plan = plan_for(form, **options)
    found = read(plan.parser(), [text])
    assert read(plan.parser(), list(text)) == found
    return found


PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
BARE = f'{{"name": "weather", "parameters": {PARIS}}}'

GOOD = [
    ("generic", "Hello there.\n", ("Hello there.\n", "", [])),
    ("generic", f"Let me see.\n{CALL}", ("Let me see.", "", [("weather", PARIS)])),
    ("hermes", f"\n{CALL}\n{NOW}\n", ("", "", [("weather", PARIS), ("now", "{}")])),
    ("hermes", f"{CALL} and then", (" and then", "", [("weather", PARIS)])),
    ("hermes", '<tool_call>{"arguments": {"a": [1, "}"]}, "name": "now"}</tool_call>',
     ("", "", [("now", '{"a": [1, "}"]}')])),
    ("hermes", '<tool_call>\n{"name": "now"}\n</tool_call>', ("", "", [("now", "{}")])),
    ("hermes", '<tool_call>{"id": {"x": [1]}, "name": "now", "arguments": {}, "y": 2}</tool_call>',
     ("", "", [("now", "{}")])),
    ("hermes", '<tool_call>{"name": "n\\u006fw", "arguments": {"a": "\\"}</tool_call>"}}</tool_call>',
     ("", "", [("now", '{"a": "\\"}</tool_call>"}')])),
    ("thinking", f"<think>\nParis?\n\nYes. </think>\n\n{CALL}", ("", "Paris?\n\nYes.", [("weather", PARIS)])),
    ("thinking", f"<think>a {CALL} b</think>\n\nText\n", ("Text\n", f"a {CALL} b", [])),
    ("thinking", "<think>\n\n</think>\n\nText", ("Text", "", [])),
    ("thinking", " <thinker> is a word", (" <thinker> is a word", "", [])),
    ("thinking", "No <think> here</think>", ("No <think> here</think>", "", [])),
    ("opened", f"Hm.\n</think>\n\n{NOW}", ("", "Hm.", [("now", "{}")])),
    ("opened", "<think>\nHm.\n</think>\n\nText", ("Text", "Hm.", [])),
    ("opened", "Hm. What", ("", "Hm. What", [])),
    ("llama", BARE, ("", "", [("weather", PARIS)])),
    ("llama", f"\n{BARE}\n", ("", "", [("weather", PARIS)])),
    ("llama", f"<|python_tag|>{BARE}<|eot_id|>", ("", "", [("weather", PARIS)])),
    ("llama", "It is {here}.", ("It is {here}.", "", [])),
    ("llama", '{"name": "Bob", "parameters": {}}', ('{"name": "Bob", "parameters": {}}', "", [])),
    ("llama", '{"name": "now", "age": 3}', ('{"name": "now", "age": 3}', "", [])),
    ("llama", '{"parameters": {"a": 1}, "name": "now"}', ("", "", [("now", '{"a": 1}')])),
    ("mistral array", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}, "id": "abcdefghi"}}, '
     '{"name": "now", "arguments": {}}]</s>',
     ("</s>", "", [("weather", PARIS), ("now", "{}")])),
    ("mistral array", f"[TOOL_CALLS]weather{PARIS}", ("", "", [("weather", PARIS)])),
    ("mistral named", f"Well. [TOOL_CALLS]weather{PARIS}[TOOL_CALLS]now{{}}",
     ("Well.", "", [("weather", PARIS), ("now", "{}")])),
    ("mistral args", f"[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]now[ARGS]{{}}",
     ("", "", [("weather", PARIS), ("now", "{}")])),
    ("mistral ids", f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{PARIS}<|im_end|>", ("", "", [("weather", PARIS)])),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "expected"), GOOD)
def test_reads(form: str, text: str, expected: Result) -> None:
    assert whole(form, text) == expected


BAD = [
    ("hermes", "<tool_call> is a mark", ("<tool_call> is a mark", "", [])),
    ("hermes", "a <tool_call>{}", ("a <tool_call>{}", "", [])),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
     ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "", [])),
    ("hermes", f"<tool_call>\n{CALL}", ("<tool_call>", "", [("weather", PARIS)])),
    ("hermes", f'<tool_call>{{"name": "now", "arguments": {{"a": 1]}}}}</tool_call>{CALL}',
     ("", "", [("now", '{"a": 1]}}'), ("weather", PARIS)])),
    ("hermes", '<tool_call>{"name": "now", what?</tool_call>', ("", "", [("now", "what?")])),
    ("hermes", f'{CALL[:-12]} oops', (" oops", "", [("weather", PARIS)])),
    ("llama", '{"name": "now", ', ('{"name": "now", ', "", [])),
    ("llama", "{", ("{", "", [])),
    ("mistral array", "[TOOL_CALLS] [what]", ("[TOOL_CALLS] [what]", "", [])),
    ("mistral array", '[TOOL_CALLS] [{"name": "now", "arguments": {}}, 3]', (", 3]", "", [("now", "{}")])),
    ("mistral named", "[TOOL_CALLS] I call now{}", ("[TOOL_CALLS] I call now{}", "", [])),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "expected"), BAD)
def test_nothing_malformed_is_lost(form: str, text: str, expected: Result) -> None:
    content, reasoning, calls = whole(form, text)
    assert (content.strip(), reasoning, calls) == (expected[0].strip(), *expected[1:])


@pytest.mark.parametrize(("form", "text", "expected"), GOOD)
def test_an_output_can_be_cut_anywhere(form: str, text: str, expected: Result) -> None:
    """The calls so far are the beginning of all calls, and arguments the beginning of theirs."""
    for place in range(len(text)):
        _, _, calls = whole(form, text[:place])
        for (name, arguments), (full_name, full) in zip(calls, expected[2], strict=False):
            assert name == full_name
            assert full.startswith(arguments)
        for (_, arguments), (_, full) in zip(calls[:-1], expected[2], strict=False):
            assert arguments == full
        assert len(calls) <= len(expected[2])


@pytest.mark.parametrize("form", ["hermes", "llama", "mistral args"])
def test_arguments_come_while_they_are_made(form: str) -> None:
    text = {
        "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "A long',
        "llama": '{"name": "weather", "parameters": {"city": "A long',
        "mistral args": '[TOOL_CALLS]weather[ARGS]{"city": "A long',
    }[form]
    parser = plan_for(form).parser()
    begun = parser.push(text)
    assert begun == [
        ToolCallDelta(0, parser.message.tool_calls[0].id, "weather"), ToolCallDelta(0, arguments='{"city": "A long'),
    ]  # fmt: skip
    assert parser.push(" name") == [ToolCallDelta(0, arguments=" name")]


def test_text_comes_at_once_but_for_what_may_be_a_mark() -> None:
    parser = plan_for("hermes").parser()
    assert parser.push("One two") == [TextDelta("One two")]
    assert parser.push(" <tool") == []
    assert parser.push("s>") == [TextDelta(" <tools>")]
    assert parser.push("\n<tool_call") == []
    assert parser.push(">") == []
    assert parser.finish() == []
    free = plan_for("hermes", tool_choice="none").parser()
    assert free.push(f" {CALL}\n") == [TextDelta(f" {CALL}\n")]  # no tools, no marks


def test_json_content_may_hold_marks() -> None:
    """With a schema, a call can only stand at the beginning."""
    content = json.dumps({"name": CALL, "x": "<think>"})
    assert whole("hermes", content, schema=True) == (content, "", [])
    assert whole("thinking", f"<think>x</think>\n\n{content}", schema=True) == (content, "x", [])
    assert whole("hermes", f"{CALL}\n{NOW}", schema=True)[2] == [("weather", PARIS)]
    assert whole("llama", '{"name": "Bob", "x": 1}', schema=True) == ('{"name": "Bob", "x": 1}', "", [])
    assert whole("llama", BARE, schema=True) == ("", "", [("weather", PARIS)])


def test_other_special_tokens_are_no_text() -> None:
    """Those vocabularies need special tokens in the text; only the marks of calls are meant."""
    text = "One [INST]two[/INST] [INS [TOOL_CALLS]now[ARGS]{}<|im_end|>"
    assert whole("mistral args", text) == ("One two [INS", "", [("now", "{}")])
    assert whole("llama", "One<|start_header_id|> two <|eot", tool_choice="auto") == ("One two <|eot", "", [])


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool", "_call>", "<think>", "</think>", "</", "[TOOL_CALLS]", "[TOOL", "[ARGS]",
    "[CALL_ID]", "abcdefghi", "<|python_tag|>", "<|eot_id|>", "[INST]", "[", "]", "{", "}", '{"name": "now", ',
    '"arguments": ', '"parameters": ', '{"city": "', '"', "\\", "\n", " ", "weather", "now", "1.5", "null", ",", ":",
    CALL, NOW, BARE, f'{{"name": "weather", "arguments": {PARIS}}}', "text", "é日", "<|im", "_end|>",
]  # fmt: skip


@pytest.mark.parametrize("form", list(TEMPLATES))
@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_the_result_does_not_depend_on_the_pieces(form: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=14)))
    schema = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    plan = plan_for(form, schema=schema)
    found = read(plan.parser(), [text])
    assert read(plan.parser(), pieces) == found
    assert read(plan.parser(), list(text)) == found
