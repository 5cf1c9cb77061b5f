"""What a caller says about tools, checked. Called by `plan`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from octavo.decode.grammar import json_grammar
from octavo.errors import RequestError

_NAME = re.compile(r"[^\s\"\\{}\[\]<>]{1,256}")
_COMBINE = ("$ref", "allOf", "anyOf", "oneOf", "if", "not", "patternProperties", "dependentSchemas")


Reason = Callable[[str], str]
"""Tells of a JSON schema, as text, why no grammar can be made of it; empty if one can."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call. `arguments`: the JSON schema of what it is given, always of an object."""

    name: str
    arguments: Mapping[str, Any]


@lru_cache(maxsize=256)
def schema_reason(schema: str) -> str:
    """A `Reason`: what the library says of it, in this process."""
    from llguidance import LLMatcher

    try:
        source = LLMatcher.grammar_from_json_schema(schema)
    except ValueError as error:
        return str(error)[:300]
    failed, messages = LLMatcher.validate_grammar_with_warnings(source)
    return messages[0].strip().split("\n\n")[0][:300] if failed else ""


def check_tools(tools: object, reason: Reason = schema_reason) -> list[Tool]:
    """The tools of OpenAI's form, or a `RequestError` with field "tools" that names the first bad one. `reason`: who
    is asked about their schemas."""
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise RequestError('tools must be a list of {"type": "function", "function": {...}}', "tools")
    checked: dict[str, Tool] = {}
    for index, tool in enumerate(tools):
        one = _check_tool(tool, f"tools[{index}]", reason)
        if one.name in checked:
            raise RequestError(f"tools[{index}]: another tool has the name {one.name!r} too", "tools")
        checked[one.name] = one
    return list(checked.values())


def check_choice(choice: object, tools: Sequence[Tool]) -> str:
    """ "auto", "required", "none" or the name of one of `tools`; else a `RequestError` with field "tool_choice"."""
    if not isinstance(choice, str) or not choice:
        raise RequestError(
            f'tool_choice must be "auto", "required", "none" or a tool\'s name, not {choice!r}', "tool_choice"
        )
    names = [tool.name for tool in tools]
    if choice in ("auto", "none") or choice in names:
        return choice
    if not names:
        raise RequestError(f"tool_choice={choice!r} needs tools, but there are none", "tool_choice")
    if choice != "required":
        raise RequestError(f"tool_choice: there is no tool {choice!r}, only {', '.join(names)}", "tool_choice")
    return choice


def _check_tool(tool: object, place: str, reason: Reason) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise RequestError(f'{place} must be {{"type": "function", "function": {{"name": ...}}}}', "tools")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{place} has no name: its function needs one", "tools")
    if not _NAME.fullmatch(name):
        raise RequestError(f"{place}: the name {name[:80]!r} has blanks, quotes or brackets, or is too long", "tools")
    place = f"{place} ({name})"
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{place}: the description must be a string, not {type(description).__name__}", "tools")
    schema = _check_parameters(function.get("parameters"), place)
    why = unsupported(schema, reason)
    if why:
        raise RequestError(f"{place}: the parameters are not supported: {why}", "tools")
    return Tool(name, schema)


def _check_parameters(parameters: object, place: str) -> dict[str, Any]:
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise RequestError(f"{place}: parameters must be a JSON schema, not {type(parameters).__name__}", "tools")
    if parameters.get("type", "object") != "object":
        raise RequestError(f"{place}: parameters must describe an object, not {parameters['type']!r}", "tools")
    if not isinstance(parameters.get("properties", {}), Mapping):
        raise RequestError(f"{place}: properties of the parameters must be a dict of JSON schemas", "tools")
    schema = {**parameters, "type": "object"}
    if "additionalProperties" not in schema and not any(name in schema for name in _COMBINE):
        schema["additionalProperties"] = False  # a function takes the parameters that it names, no others
    return schema


def unsupported(schema: Mapping[str, Any], reason: Reason = schema_reason) -> str:
    """Why a grammar cannot be made of a schema; empty if one can."""
    try:
        text = json_grammar(schema)
    except (TypeError, ValueError, RecursionError) as error:
        return f"they are no JSON: {str(error)[:200]}"
    return reason(text)
