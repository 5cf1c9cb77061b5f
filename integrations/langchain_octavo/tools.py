"""Tools as users give them, as OpenAI has them: checked, named, with schemas that a grammar can enforce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from octavo.chat import closed
from octavo.errors import RequestError
from pydantic import BaseModel

from langchain_octavo.schemas import is_recursive

Tool = dict[str, Any] | type | Callable[..., Any] | BaseTool


def tools_as_openai(tools: Sequence[Tool], *, strict: bool | None = None) -> list[dict[str, Any]]:
    """Each as {"type": "function", "function": {"name", "description", "parameters"}}. Unless `strict` is False,
    arguments have no keys that the schema does not name.

    Raises `RequestError` (field "tools") that names the tool.
    """
    return [_tool(tool, strict) for tool in tools]


def _tool(tool: Tool, strict: bool | None) -> dict[str, Any]:
    shown = getattr(tool, "name", None) or getattr(tool, "__name__", None) or repr(tool)[:80]
    try:
        converted = convert_to_openai_tool(tool)
    except Exception as error:  # of pydantic or LangChain, of any kind
        raise RequestError(f"tool {shown} has no sound schema: {str(error).strip()[:300]}", "tools") from error
    function = converted.get("function")
    if converted.get("type") != "function" or not isinstance(function, Mapping):
        raise RequestError(f"tool {shown} is not a function: this model can call functions only", "tools")
    name, parameters = function.get("name"), _parameters(tool, function)
    if not isinstance(name, str) or not name:
        raise RequestError(f"tool {shown} has no name", "tools")
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(f"the parameters of tool {name} must be a JSON schema of an object", "tools")
    schema = dict(parameters) if strict is False else closed(dict(parameters))
    return {"type": "function", "function": {**function, "parameters": schema}}


def _parameters(tool: Tool, function: Mapping[str, Any]) -> Any:
    """A tool's schema. LangChain replaces references by what they refer to, which a recursive class has no end of."""
    source = tool.tool_call_schema if isinstance(tool, BaseTool) else tool
    if isinstance(source, type) and issubclass(source, BaseModel):
        whole = source.model_json_schema()
        if is_recursive(whole):
            return {"type": "object", **whole}
    return function.get("parameters") or {"type": "object", "properties": {}}


def tool_choice_of(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """LangChain's and OpenAI's words for which tool must be called, as "auto", "required", "none" or a name; None if
    nothing was asked. Raises `RequestError` (field "tool_choice")."""
    if choice is None or choice is False:
        return None
    if choice is True or choice in ("any", "required"):
        return "required"
    if isinstance(choice, Mapping):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    if choice in ("auto", "none"):
        return str(choice)
    names = [tool["function"]["name"] for tool in tools]
    if choice not in names:
        known = ", ".join(names) or "there are none"
        raise RequestError(
            f'tool_choice {choice!r} names no tool ({known}): use one of their names, "auto", "any" or "none"',
            "tool_choice",
        )
    return str(choice)
