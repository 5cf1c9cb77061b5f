"""`plan_chat`: prompts that tell of tools, and grammars that hold a model to the form of calls."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from chat_templates import HERMES, PLAIN, TEMPLATES, tokenizer_for
from octavo import RequestError, SamplingParams, StructuredOutputsParams
from octavo.chat import ChatPlan, ParsedMessage, plan_chat, response_format
from octavo.chat.formats import tool_format
from octavo.decode.detokenize import Detokenizer
from octavo.decode.grammar import Grammars
from octavo.errors import RequestFailedError

FORMS = list(TEMPLATES)
USER = [{"role": "user", "content": "Hi"}]
PLACE = {
    "type": "object", "properties": {"kind": {"enum": ["city", "sea"]}, "within": {"$ref": "#/$defs/Place"}},
    "required": ["kind"], "additionalProperties": False,
}  # fmt: skip
WEATHER = {
    "type": "object", "required": ["where", "days"], "$defs": {"Place": PLACE},
    "properties": {
        "where": {"$ref": "#/$defs/Place"}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "note": {"type": "string"},
    },
}  # fmt: skip
MAP = {
    "type": "object", "required": ["layers"],
    "properties": {"layers": {"type": "array", "items": {"$ref": "#/$defs/Place"}, "minItems": 1}},
    "$defs": {"Place": {"enum": ["rain", "wind"]}},  # the same name for something else
}  # fmt: skip
PARAMETERS: dict[str, Any] = {"weather": WEATHER, "weather_map": MAP, "now": {"type": "object", "maxProperties": 0}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": 'It\'s "weather"', "parameters": WEATHER}},
    {"type": "function", "function": {"name": "weather_map", "parameters": MAP}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


def plan_for(form: str, messages: Any = USER, params: SamplingParams | None = None, **options: Any) -> ChatPlan:
    options = {"tools": TOOLS, **options}
    return plan_chat(tokenizer_for(form), messages, params or SamplingParams(), **options)


# -- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_schema_is_shown_to_the_model_beside_what_the_user_said(form: str) -> None:
    described = {"type": "object", "properties": {"name": {"type": "string", "description": "In *French*"}}}
    for messages in (USER, [{"role": "system", "content": "Be brief."}, *USER]):
        for tools in (None, TOOLS):
            text = plan_for(form, messages, tools=tools, json_schema=described).prompt["prompt"]
            assert text.count(json.dumps(described)) == 1
            assert "Hi" in text
            assert ("Be brief." in text) == (len(messages) == 2)
    assert "schema" not in plan_for(form, tools=None, json_object=True).prompt["prompt"]


def test_response_format() -> None:
    assert response_format(None) == response_format({"type": "text"}) == {}
    assert response_format({"type": "json_object"}) == {"json_object": True}
    asked = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    assert response_format(asked) == {"json_schema": SCHEMA}
    for wrong in ("json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": SCHEMA}):
        with pytest.raises(RequestError) as caught:
            response_format(wrong)
        assert caught.value.field == "response_format"



def called(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Paris, and the time?"},
    {"role": "assistant", "content": None, "tool_calls": [called("weather", '{"days": 1}'), called("now", {}, 2)]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
    {"role": "assistant", "content": "Sunny at noon.", "tool_calls": []},
    {"role": "user", "content": "And the sea?"},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_every_template_takes_a_conversation_with_calls(form: str, tools: Any) -> None:
    plan = plan_for(form, HISTORY, tools=tools)
    text = plan.prompt["prompt"]
    for part in ('{"days": 1}', "sunny", "noon", "Sunny at noon.", "And the sea?"):
        assert part in text
    assert ("weather_map" in text) == (tools is not None)
    assert plan.prompt["prompt_token_ids"] == tokenizer_for(form).encode(text, add_special_tokens=False)
    assert HISTORY[1]["tool_calls"][0]["function"]["arguments"] == '{"days": 1}'  # the caller's stay as they are


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_told_of_no_tools_with_none(form: str) -> None:
    plan = plan_for(form, tool_choice="none")
    assert plan.prompt == plan_for(form, tools=None).prompt
    assert "weather" not in plan.prompt["prompt"]
    assert plan.params == SamplingParams()


def test_templates_without_tools_get_a_text_of_ours() -> None:
    text = plan_for("generic", [{"role": "system", "content": "Be brief."}, *HISTORY]).prompt["prompt"]
    system, *turns = text.split("<|im_start|>")[1:]
    examples, (user, call, results, answer, again, _) = turns[:16], turns[16:]
    assert [turn.split("\n")[0] for turn in examples] == ["user", "assistant"] * 8
    assert [json.loads(turn.split("\n")[2])["name"] for turn in examples[1::4]] == [
        "clock", "dictionary", "play_music", "exchange",
    ]  # fmt: skip
    assert system.startswith("system\nBe brief.\n\n")
    assert json.dumps(WEATHER) in system
    assert '{"name": "now"}' in system
    assert user.startswith("user\nWeather in Paris")
    assert call == (
        'assistant\n<tool_call>\n{"name": "weather", "arguments": {"days": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
    )
    assert results == (
        "user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
    )
    assert answer == "assistant\nSunny at noon.<|im_end|>\n"
    assert again == "user\nAnd the sea?<|im_end|>\n"


def test_a_question_after_results_is_one_message_with_them() -> None:
    text = plan_for("generic", [*HISTORY[:4], {"role": "user", "content": "So?"}]).prompt["prompt"]
    assert "noon\n</tool_response>\nSo?<|im_end|>" in text


def test_templates_without_a_system_message() -> None:
    strict = '{%- if messages[0].role == "system" %}{{ raise_exception("no system") }}{% endif %}' + PLAIN
    text = plan_for("generic", chat_template=strict).prompt["prompt"]
    assert text.startswith("<|im_start|>user\nYou can call these tools:")
    assert "\n\nWhat time is it in Oslo?<|im_end|>" in text
    assert "<|im_start|>user\nHi<|im_end|>" in text
    with pytest.raises(RequestError, match="no system"):
        plan_for("hermes", [{"role": "system", "content": "x"}, *USER], tools=None, chat_template=strict)


def test_calls_of_one_message_take_turns_where_templates_want_it() -> None:
    text = plan_for("llama", HISTORY).prompt["prompt"]
    order = [
        '"parameters": {"days": 1}}',
        "ipython<|end_header_id|>\n\nsunny",
        '{"name": "now"',
        "\n\nnoon",
        "Sunny at noon.",
    ]
    places = [text.rindex(part) for part in order]
    assert places == sorted(places)
    unanswered = [*HISTORY[:2], {"role": "user", "content": "Never mind."}]
    assert '"parameters": {}' in plan_for("llama", unanswered).prompt["prompt"]


def test_mistral_ids_have_nine_letters() -> None:
    own = [*HISTORY[:1], {"role": "assistant", "tool_calls": [{**called("now", {}), "id": "abcDEF123"}]}]
    assert '"id": "abcDEF123"' in plan_for("mistral array", own).prompt["prompt"]
    text = plan_for("mistral ids", HISTORY).prompt["prompt"]
    ids = [part.split("[ARGS]")[0] for part in text.split("[CALL_ID]")[1:]]
    assert len({*ids}) == 2
    assert all(len(one) == 9 and one.isalnum() for one in ids)


def test_formats_by_template() -> None:
    expected = {
        "generic": "Generic", "hermes": "Hermes", "thinking": "Hermes", "opened": "Hermes", "llama": "Llama",
        "mistral array": "Mistral", "mistral named": "Mistral", "mistral args": "Mistral", "mistral ids": "Mistral",
    }  # fmt: skip
    assert {form: type(tool_format(source)).__name__ for form, source in TEMPLATES.items()} == expected
    others = ["{{ messages }} <tool_call>", HERMES + "<function=", "{% for t in tools %}<other>{% endfor %}"]
    assert {type(tool_format(source)).__name__ for source in others} == {"Generic"}


# -- errors ----------------------------------------------------------------------------------------------------------


def function(**parts: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **parts}}]


DEEP: Any = {}
for _ in range(3000):
    DEEP = {"items": DEEP}
BAD = [
    ({"tools": {"f": 1}}, "tools", "list"),
    ({"tools": ["f"]}, "tools", r"tools\[0\]"),
    ({"tools": [{"type": "retrieval"}]}, "tools", r"tools\[0\]"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "no name"),
    ({"tools": function(name="a b")}, "tools", "blanks"),
    ({"tools": function(name="x" * 300)}, "tools", "too long"),
    ({"tools": function() + function()}, "tools", r"tools\[1\].*'f'"),
    ({"tools": function(description=3)}, "tools", r"\(f\).*description"),
    ({"tools": function(parameters=[])}, "tools", r"\(f\).*JSON schema"),
    ({"tools": function(parameters={"type": "string"})}, "tools", r"\(f\).*object"),
    ({"tools": function(parameters={"properties": []})}, "tools", r"\(f\).*properties"),
    ({"tools": function(parameters={"properties": {"a": {"type": "nothing"}}})}, "tools", r"\(f\).*not supported"),
    ({"tools": function(parameters={"properties": {"a": {"$ref": "#/$defs/X"}}})}, "tools", r"\(f\).*not supported"),
    ({"tools": function(parameters={"properties": {"a": {"const": object()}}})}, "tools", r"\(f\)"),
    ({"tools": function(parameters=DEEP)}, "tools", r"\(f\)"),
    ({"tool_choice": "forecast"}, "tool_choice", "forecast.*weather, weather_map, now"),
    ({"tool_choice": None}, "tool_choice", "None"),
    ({"tool_choice": {"name": "now"}}, "tool_choice", "auto"),
    ({"tool_choice": "required", "tools": None}, "tool_choice", "required"),
    ({"tool_choice": "now", "tools": []}, "tool_choice", "now"),
    ({"json_schema": SCHEMA, "json_object": True}, "json_schema", "exclude"),
    ({"json_schema": "{}"}, "json_schema", "dict"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "True"),
    ({"json_schema": {"type": "nothing"}}, "json_schema", "not supported"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": {"a": 1}}]}, "messages", r"messages\[0\]"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]}, "messages", r"messages\[0\]"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{**called("f", {}), "id": []}]}]}, "messages",
     r"messages\[0\].*id"),
    ({"messages": [{"role": "tool", "content": "", "tool_call_id": []}]}, "messages", r"messages\[0\].*tool_call_id"),
    ({"messages": []}, "messages", "empty"),
    ({"params": SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))}, "structured_outputs", "tools"),
    ({"chat_template_kwargs": {"x": object()}}, "chat_template_kwargs", "object"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "field", "words"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_named(options: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        plan_for("generic", **options)
    assert caught.value.field == field


# -- grammars --------------------------------------------------------------------------------------------------------


@lru_cache
def grammars(form: str) -> Grammars:
    tokenizer = tokenizer_for(form)
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def fits(form: str, plan: ChatPlan, text: str) -> bool:
    """The grammar takes `text` as a whole output."""
    assert plan.params.structured_outputs is not None
    tokenizer = tokenizer_for(form)
    constraint = grammars(form).compile(plan.params.structured_outputs).start()
    ids = tokenizer.encode(text, add_special_tokens=False)
    try:
        for place, token in enumerate(ids):
            if constraint.accept(token):
                return place == len(ids) - 1
    except RequestFailedError:
        return False
    mask = constraint.allowed(100_000)
    end = tokenizer.eos_token_ids[0]
    return bool(mask[end >> 5] >> (end & 31) & 1)


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>' for name, text in calls)


def llama(*calls: tuple[str, str]) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {text}}}' for name, text in calls)


def mistral_array(*calls: tuple[str, str]) -> str:
    written = ", ".join(f'{{"name": "{name}", "arguments": {text}}}' for name, text in calls)
    return f"[TOOL_CALLS] [{written}]"


def mistral(between: str) -> Any:
    return lambda *calls: "".join(f"[TOOL_CALLS]{name}{between}{text}" for name, text in calls)


WRITTEN = {
    "generic": hermes, "hermes": hermes, "thinking": hermes, "opened": hermes, "llama": llama,
    "mistral array": mistral_array, "mistral named": mistral(""), "mistral args": mistral("[ARGS]"),
    "mistral ids": mistral("[CALL_ID]abcDEF123[ARGS]"),
}  # fmt: skip
NOW, RAIN = ("now", "{}"), ("weather_map", '{"layers": ["rain"]}')
PARIS = (
    "weather",
    '{"where": {"kind": "city", "within": {"kind": "sea"}}, "days": 3, "note": "\\"é\\" <tool_call> {"}',
)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_grammar_takes(form: str) -> None:
    write, thought = WRITTEN[form], "Hm.</think>\n\n" if form == "opened" else ""
    many = form not in ("llama", "generic")

    def check(takes: dict[str, bool], **options: Any) -> None:
        plan = plan_for(form, **options)
        for text, expected in takes.items():
            assert fits(form, plan, thought + text) == expected, (options, text)

    every_call = {write(NOW): True, write(RAIN): True, write(PARIS): True, write(NOW, PARIS): many}
    wrong = {
        write(("then", "{}")): False, write(("now", '{"a": 1}')): False, write(("weather", '{"days": 3}')): False,
        write(("weather_map", '{"layers": []}')): False, write(("weather_map", '{"layers": ["city"]}')): False,
        write(NOW)[:-1]: False,
    }  # fmt: skip
    text = {"Hello {there}.": True, "": True, "<tool": True}
    no_text = dict.fromkeys(text, False)
    check(
        {**every_call, **wrong, **no_text, write(NOW) + "Hello": False, "Hello" + write(NOW): False},
        tool_choice="required",
    )
    check(
        {**every_call, **wrong, **text, "Well.\n" + write(NOW): True, write(NOW) + " more": False}, tool_choice="auto"
    )
    single = {write(NOW): True, write(RAIN): False, write(NOW, NOW): False, "Hello": False}
    check(single, tool_choice="now")
    one = {**every_call, write(NOW, PARIS): False, "Hello": True}
    check(one, tool_choice="auto", parallel_tool_calls=False)
    check({**one, "Hello": False}, tool_choice="required", parallel_tool_calls=False)
    content = '{"name": "<tool_call> <think>"}'
    check({**every_call, **wrong, content: True, '{"name": 1}': False, **no_text}, json_schema=SCHEMA)
    check({'{"a": [1, {"b": "c"}]}': True, "[1]": False, **no_text}, tools=None, json_object=True)
    check({content: True, '{"name": 1}': False, write(NOW): False}, tools=None, json_schema=SCHEMA)


def test_several_calls_where_a_model_was_not_made_for_tools() -> None:
    """Only if they are asked for: a small model would go on calling."""
    assert not fits("generic", plan_for("generic"), hermes(NOW, PARIS))
    assert fits("generic", plan_for("generic", parallel_tool_calls=True), hermes(NOW, PARIS))


def test_text_that_would_be_a_call_is_none() -> None:
    assert not fits("llama", plan_for("llama"), '{"a": 1}')
    assert fits("llama", plan_for("llama"), "<|python_tag|>" + llama(NOW))
    assert not fits("llama", plan_for("llama"), "Well: <|python_tag|>" + llama(NOW))
    assert not fits("llama", plan_for("llama"), "<|start_header_id|>")
    assert not fits("hermes", plan_for("hermes"), "I write <tool_call> so.")
    assert not fits("mistral named", plan_for("mistral named"), "One[INST]")


def test_thoughts_come_first() -> None:
    thought = "<think>\nShould I <tool_call> now? {</think>"
    for choice in ("auto", "required", "now"):
        plan = plan_for("thinking", tool_choice=choice)
        assert fits("thinking", plan, hermes(NOW))
        assert fits("thinking", plan, f"{thought}\n\n{hermes(NOW)}")
        assert not fits("thinking", plan, f"{thought}\n\n<tool_call>\nnow")
        assert fits("thinking", plan, f"{thought}\n\nHello") == (choice == "auto")
        assert not fits("thinking", plan, "<think>\nHm.")
        opened = plan_for("opened", tool_choice=choice)
        assert not fits("opened", opened, hermes(NOW))
    plan = plan_for("thinking", tools=None, json_schema=SCHEMA)
    assert fits("thinking", plan, '<think>{"name": 1}</think>\n\n{"name": "x"}')
    assert fits("thinking", plan, '{"name": "x"}')
    off = plan_for("thinking", tools=None, json_schema=SCHEMA, chat_template_kwargs={"enable_thinking": False})
    assert off.params.structured_outputs == StructuredOutputsParams(json=SCHEMA)
    parser = off.parser()
    parser.push("<think>")
    parser.finish()
    assert parser.message == ParsedMessage("<think>")


def test_a_grammar_only_where_it_is_needed() -> None:
    plain = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    for form in FORMS:
        assert plan_for(form, tools=None).params == SamplingParams()
        assert plan_for(form, tools=None, params=plain).params == plain
        assert plan_for(form, tool_choice="none", params=plain).params == plain
        assert plan_for(form).params.skip_special_tokens == (form.split()[0] not in ("mistral", "llama"))
    assert plan_for("generic", tools=None, json_object=True).params.structured_outputs is not None


def test_tools_take_no_more_than_they_name() -> None:
    tools = function(parameters={"properties": {"a": {"type": "integer"}}})
    assert not fits("hermes", plan_for("hermes", tools=tools), hermes(("f", '{"a": 1, "b": 2}')))
    tools = function(parameters={"properties": {"a": {"type": "integer"}}, "additionalProperties": True})
    assert fits("hermes", plan_for("hermes", tools=tools), hermes(("f", '{"a": 1, "b": 2}')))
    tools = function(parameters={"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "required": ["a"]}}})
    assert fits("hermes", plan_for("hermes", tools=tools), hermes(("f", '{"a": 1}')))
    assert not fits("hermes", plan_for("hermes", tools=tools), hermes(("f", "{}")))


# -- random walks ----------------------------------------------------------------------------------------------------


def walk(form: str, plan: ChatPlan, chance: random.Random, begin: str = "") -> list[int]:
    """An output of tokens drawn from those that the grammar allows, often those that close something."""
    assert plan.params.structured_outputs is not None
    tokenizer = tokenizer_for(form)
    constraint = grammars(form).compile(plan.params.structured_outputs).start()
    closing = {*tokenizer.eos_token_ids, *map(tokenizer.backend.token_to_id, ("</think>", '"', "}", "]"))}
    ids: list[int] = []
    wanted = tokenizer.encode(begin, add_special_tokens=False)
    for _ in range(1000):
        mask = constraint.allowed(100_000)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        usual = closing.intersection(allowed)
        if wanted:
            token = wanted.pop(0)
        elif usual and chance.random() < 0.4:
            token = chance.choice(sorted(usual))
        else:
            token = int(allowed[chance.randrange(len(allowed))])
        if token in tokenizer.eos_token_ids:
            return ids
        ids.append(token)
        if constraint.accept(token):
            return ids
    raise AssertionError(tokenizer.decode(ids, skip_special_tokens=False))


def parsed(form: str, plan: ChatPlan, ids: list[int]) -> ParsedMessage:
    """As a stream of single tokens."""
    text = Detokenizer(tokenizer_for(form), plan.prompt["prompt_token_ids"], plan.params.skip_special_tokens)
    parser = plan.parser()
    for token in ids:
        parser.push(text.push([token]))
    parser.push(text.flush())
    parser.finish()
    return parser.message


MARKERS = {"llama": "{", "mistral": "[TOOL_CALLS]"}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_a_model_prefers_its_calls_are_valid(form: str) -> None:
    chance = random.Random(form)
    thought = "Hm.</think>\n\n" if form == "opened" else ""
    text = "" if form == "llama" else "Let me see. "
    begin = {"auto": thought + text + MARKERS.get(form.split()[0], "<tool_call>")}
    seen: set[str] = set()
    for choice in ["required"] * 20 + ["weather"] * 10 + ["auto"] * 20:
        plan = plan_for(form, tool_choice=choice)
        ids = walk(form, plan, chance, begin.get(choice, ""))
        message = parsed(form, plan, ids)
        where = tokenizer_for(form).decode(ids, skip_special_tokens=False)
        assert message.tool_calls, where
        assert message.content == (text.strip() if choice == "auto" else ""), where
        for call in message.tool_calls:
            jsonschema.validate(json.loads(call.arguments), PARAMETERS[call.name])
            seen.add(call.name)
        if choice == "weather":
            assert [call.name for call in message.tool_calls] == ["weather"]
    assert seen == {"weather", "weather_map", "now"}
