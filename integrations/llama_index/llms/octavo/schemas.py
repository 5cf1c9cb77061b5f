"""From tools and pydantic classes to the JSON schemas that grammars are made of. Called by `options` and `tools`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.tools.types import BaseTool

from octavo.chat import closed, response_format
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


def planned_form(form: Any) -> dict[str, Any]:
    """A `response_format` as arguments of `plan_chat`: a pydantic class, or a dict of OpenAI's form."""
    if isinstance(form, type) and issubclass(form, BaseModel):
        return {"json_schema": class_schema(form)}
    return response_format(form)
