"""Earlier messages of a chat, shaped for a template. Called by `formats/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from octavo.errors import RequestError

Messages = list[dict[str, Any]]

_INTRODUCTION = "You can call these tools:"
_INSTRUCTION = (
    "To call a tool, write nothing but its name and arguments in this form:\n"
    '<tool_call>\n{"name": "the tool\'s name", "arguments": {"argument": "value"}}\n</tool_call>\n'
    "Its result comes in <tool_response></tool_response>."
)
_SCHEMA = "Answer with JSON that satisfies this schema:"
_EXAMPLES = (
    ("What time is it in Oslo?", "clock", {"city": "Oslo"}, "14:05", "It is 14:05 in Oslo."),
    ("How do you say tree in French?", "dictionary", {"word": "tree", "language": "French"}, "arbre",
     "Tree is arbre in French."),
    ("Play some jazz.", "play_music", {"genre": "jazz"}, "playing", "I am playing jazz for you."),
    ("How much is 10 dollars in euros?", "exchange", {"amount": 10, "source": "dollars", "target": "euros"}, "9.2",
     "10 dollars are 9.2 euros."),
)  # fmt: skip
"""Question, tool, arguments, result, answer."""


def plain_arguments(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Calls with arguments as objects, which templates write as JSON, and tool messages with the tool's name."""
    names: dict[str, str] = {}
    shaped: Messages = []
    for index, message in enumerate(messages):
        shaped.append({**message})
        answered = message.get("tool_call_id")
        if not isinstance(answered, str | None):
            raise RequestError(f"messages[{index}]: tool_call_id must be a string", "messages")
        if message.get("tool_calls"):
            place = f"messages[{index}]: a call in tool_calls"
            if not isinstance(message["tool_calls"], list):
                raise RequestError(f"messages[{index}]: tool_calls must be a list", "messages")
            shaped[-1]["tool_calls"] = calls = [_call(call, place) for call in message["tool_calls"]]
            names.update({call["id"]: call["function"]["name"] for call in calls if call.get("id")})
        else:
            shaped[-1].pop("tool_calls", None)  # templates ask whether there is such a key
        if message["role"] == "tool" and not message.get("name") and answered in names:
            shaped[-1]["name"] = names[answered]
    return shaped


def one_call_each(messages: Messages) -> Messages:
    """Each call in a message of its own, with its result after it, for templates that know no more."""
    shaped: Messages = []
    waiting: Messages = []
    for message in messages:
        calls = message.get("tool_calls") or []
        if message["role"] == "tool" and waiting:
            # the call that it answers, or else the first
            call = next((one for one in waiting if _id(one) == message.get("tool_call_id")), waiting[0])
            waiting.remove(call)
            shaped += [call, message]
            continue
        shaped, waiting = shaped + waiting, []
        if len(calls) < 2:
            shaped.append(message)
        else:
            waiting = [{**message, "tool_calls": [call], "content": ""} for call in calls]
            waiting[0]["content"] = message["content"]
    return shaped + waiting


def spelled_out(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Calls as text of the assistant, results as text of the user; messages of the user that follow each other are
    one, because many templates want the roles to take turns."""
    shaped: Messages = []
    for message in plain_arguments(messages):
        parts = [message["content"]] if message["content"] else []
        for call in message.pop("tool_calls", None) or ():
            function = {name: call["function"][name] for name in ("name", "arguments")}
            parts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
        message["content"] = "\n".join(parts)
        is_result = message["role"] == "tool"
        if is_result:
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        if shaped and message["role"] == shaped[-1]["role"] == "user" and (is_result or shaped[-1].get("result")):
            shaped[-1]["content"] += "\n" + message["content"]
        else:
            shaped.append({**message, "result": is_result})
    for message in shaped:
        del message["result"]
    return shaped


def tell_of_tools(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> Messages:
    """The tools in the system message, and turns that show how they are called: a model which was never taught to call
    tools does it by example only. (By hand: the default model of 135M parameters called none by instructions, with one
    example, or with the examples in the system message.)"""
    if not tools:
        return messages
    described = [json.dumps(_described(tool["function"]), ensure_ascii=False) for tool in tools]
    first, *others = _with_system(messages, "\n".join([_INTRODUCTION, *described, _INSTRUCTION]))
    return [first, *_examples(), *others]


def tell_of_schema(messages: Messages, schema: Mapping[str, Any]) -> Messages:
    """The schema in the system message: a grammar holds the answer to its form, and only this says what it means."""
    return _with_system(messages, f"{_SCHEMA}\n{json.dumps(schema, ensure_ascii=False)}")


def _with_system(messages: Messages, text: str) -> Messages:
    """`text` at the end of the system message, or as one."""
    if messages[0]["role"] in ("system", "developer"):
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _examples() -> Messages:
    turns: Messages = []
    for question, tool, arguments, result, answer in _EXAMPLES:
        call = {"function": {"name": tool, "arguments": arguments}}
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": answer},
        ]
    return spelled_out(turns)


def without_system(messages: Messages) -> Messages:
    """The system message at the head of the first message of the user, for templates that have no such role."""
    if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
        return messages
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _described(function: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function[name] for name in ("name", "description", "parameters") if function.get(name)}


def _id(message: Mapping[str, Any]) -> object:
    return message["tool_calls"][0].get("id")


def _call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        message = f'{place} must be {{"id": ..., "type": "function", "function": {{"name": ..., "arguments": ...}}}}'
        raise RequestError(message, "messages")
    if not isinstance(call.get("id"), str | None):
        raise RequestError(f"{place} has an id that is no string", "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):  # an output that was cut stays as it is
            arguments = json.loads(arguments or "{}")
    return {"type": "function", **call, "function": {**function, "arguments": {} if arguments is None else arguments}}
