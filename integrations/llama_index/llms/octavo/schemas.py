"""From tools and pydantic classes to the JSON schemas that grammars are made of. Called by `options` and `tools`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.tools.types import BaseTool

from octavo.chat import closed
from octavo.errors import RequestError


def class_schema(output_cls: type[BaseModel]) -> dict[str, Any]:
    """The schema of a class, closed."""
    schema: dict[str, Any] = closed(output_cls.model_json_schema())
    return schema


def openai_tool(tool: Any) -> dict[str, Any]:
    """A tool in OpenAI's form: from a tool of LlamaIndex, whose schema is closed, or from such a dict, which is left as
    it is. Raises `RequestError` on anything else."""
    if isinstance(tool, Mapping):
        return dict(tool)
    if not isinstance(tool, BaseTool):
        raise RequestError(f"a tool must be a LlamaIndex tool or a dict, not {type(tool).__name__}", "tools")
    try:
        made: dict[str, Any] = tool.metadata.to_openai_tool(skip_length_check=True)
    except Exception as error:  # whatever pydantic says of the types of a function's arguments
        raise RequestError(f"tool {tool.metadata.name!r} has no JSON schema: {error}", "tools") from error
    return {**made, "function": {**made["function"], "parameters": closed(made["function"]["parameters"])}}


def response_format(form: Any) -> tuple[dict[str, Any] | None, bool]:
    """The schema, or whether any JSON object will do: from a pydantic class or a dict of OpenAI's form."""
    if form is None:
        return None, False
    if isinstance(form, type) and issubclass(form, BaseModel):
        return class_schema(form), False
    if isinstance(form, Mapping):
        kind, inner = form.get("type"), form.get("json_schema")
        if kind == "json_schema" and isinstance(inner, Mapping) and isinstance(inner.get("schema"), Mapping):
            return dict(inner["schema"]), False
        if kind in ("json_object", "text"):
            return None, kind == "json_object"
    raise RequestError(
        'response_format must be a pydantic class, {"type": "json_object"} or '
        '{"type": "json_schema", "json_schema": {"schema": ...}}', "response_format",
    )  # fmt: skip
