"""`CallOptions`: the keyword arguments of one call, checked. Also the words for what is refused.

Called by `fields.py` at construction and by `llm.py` at each call.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from llama_index.llms.octavo.schemas import openai_tool, planned_form

from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams

SAMPLING = frozenset(field.name for field in fields(SamplingParams))
ENGINE = frozenset(field.name for field in fields(EngineConfig))
PLAIN = frozenset({"priority"})
"""Of a prompt that goes to the model as it is, besides `SAMPLING`."""
TEMPLATED = PLAIN | {"chat_template", "chat_template_kwargs", "response_format"}
"""Of a prompt that the chat template makes."""
CHAT = TEMPLATED | {"tools", "tool_choice", "parallel_tool_calls"}


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What one call asks for beside sampling parameters, in the words of `octavo.chat.plan_chat`."""

    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "auto"
    parallel_tool_calls: bool | None = None
    json_schema: dict[str, Any] | None = None
    json_object: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    priority: int = 0


def call_options(given: Mapping[str, Any], allowed: frozenset[str]) -> CallOptions:
    """The options among `given`; sampling parameters are left to `OctavoFields.sampling_params`. None means: not given.

    Raises `RequestError` that names what is unknown or malformed.
    """
    refuse_unknown(given, SAMPLING | allowed, "argument")
    rest = {name: value for name, value in given.items() if name in allowed and value is not None}
    tools = rest.pop("tools", None)
    if "tool_choice" in rest:
        rest["tool_choice"] = _tool_choice(rest["tool_choice"])
    form = planned_form(rest.pop("response_format", None))
    return CallOptions(tools=[openai_tool(tool) for tool in _sequence(tools)] or None, **form, **rest)


def _sequence(tools: Any) -> Sequence[Any]:
    if tools is None:
        return ()
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"tools must be a list, not {type(tools).__name__}", "tools")
    return tools


def _tool_choice(choice: Any) -> str:
    """A name, "auto", "required" (also called "any") or "none"; a dict of OpenAI's form names a tool."""
    if isinstance(choice, Mapping):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    if not isinstance(choice, str) or not choice:
        raise RequestError('tool_choice must be "auto", "required", "none" or the name of a tool', "tool_choice")
    return "required" if choice == "any" else choice


def refuse_unknown(given: Iterable[str], known: frozenset[str], what: str) -> None:
    """`RequestError` that names the first of `given` which is not `known`, and what was probably meant."""
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        if name in ENGINE:
            hint = f": it is a setting of the engine, so give it to the constructor as engine_kwargs={{{name!r}: ...}}"
        raise RequestError(f"unknown {what} {name!r}{hint}", name)
