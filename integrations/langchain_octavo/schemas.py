"""JSON schemas of what users give: Pydantic classes (1 and 2), TypedDict classes, JSON schemas, OpenAI functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from octavo.errors import RequestError
from pydantic import BaseModel


def is_pydantic(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def json_schema(schema: Any) -> dict[str, Any]:
    """`schema` as a JSON schema, references and all: LangChain's own conversion forgets what a recursive class holds.

    Raises `RequestError` (field "schema").
    """
    if isinstance(schema, Mapping):
        return _from_mapping(dict(schema))
    try:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            return dict(schema.model_json_schema())
        if is_pydantic(schema):
            return dict(schema.schema())
        return dict(convert_to_json_schema(schema))
    except Exception as error:  # of pydantic or LangChain, of any kind
        raise _no_schema(schema, str(error)) from error


def _from_mapping(schema: dict[str, Any]) -> dict[str, Any]:
    function = schema.get("function")
    if schema.get("type") == "function" and isinstance(function, Mapping):
        schema = dict(function)
    if "name" in schema and isinstance(schema.get("parameters"), Mapping):
        return {"title": schema["name"], **schema["parameters"]}
    if not schema or not set(schema) & _WORDS:
        raise _no_schema(schema, "it has none of JSON Schema's words")
    return schema


_WORDS = frozenset(
    {"type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "items", "prefixItems", "pattern"}
)


def _no_schema(schema: Any, reason: str) -> RequestError:
    shown = schema.__name__ if isinstance(schema, type) else repr(schema)
    return RequestError(
        f"schema {shown[:80]} is no Pydantic class, TypedDict class, JSON schema or OpenAI function: {reason[:300]}",
        "schema",
    )


def name_of(schema: Any) -> str:
    if isinstance(schema, type):
        return schema.__name__
    return str(json_schema(schema).get("title") or "answer")


def is_recursive(schema: dict[str, Any]) -> bool:
    """Whether a definition refers to itself, by whatever way round."""
    parts = {**schema.get("definitions", {}), **schema.get("$defs", {})}

    def reaches(part: Any, seen: frozenset[str]) -> bool:
        if isinstance(part, list):
            return any(reaches(item, seen) for item in part)
        if not isinstance(part, dict):
            return False
        name = str(part["$ref"]).rsplit("/", 1)[-1] if isinstance(part.get("$ref"), str) else None
        if name is not None and name in seen:
            return True
        if name is not None and name in parts and reaches(parts[name], seen | {name}):
            return True
        return any(reaches(item, seen) for key, item in part.items() if key not in ("$defs", "definitions"))

    return reaches(schema, frozenset())
