"""JSON schemas of classes and functions, made fit for a grammar. Called by the doors."""

from __future__ import annotations

from typing import Any

_MAPS = ("properties", "$defs", "definitions", "patternProperties")
_PARTS = ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties")
_TOGETHER = ("allOf", "anyOf", "oneOf", "$ref")


def closed(schema: Any) -> Any:
    """`schema` with "additionalProperties": false for every object that names its properties and says nothing of
    others: a small model would make some up. Parts of an `allOf` stay as they are, as each knows some keys only."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            found[key] = {name: closed(item) for name, item in value.items()}
        elif key in _PARTS:
            found[key] = closed(value)
        else:
            found[key] = value
    named = isinstance(found.get("properties"), dict)
    if named and not set(found) & {"additionalProperties", "patternProperties", "unevaluatedProperties", *_TOGETHER}:
        found["additionalProperties"] = False
    return found
