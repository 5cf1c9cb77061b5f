"""OpenAI's `response_format`, read. Called by the doors that take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import RequestError


def response_format(form: object) -> dict[str, Any]:
    """`form` as arguments of `plan_chat`: "json_schema", "json_object" or none of them.

    Raises `RequestError` (field "response_format") on anything but None, {"type": "text"}, {"type": "json_object"} and
    {"type": "json_schema", "json_schema": {"schema": ...}}.
    """
    if form is None:
        return {}
    if isinstance(form, Mapping):
        kind, inner = form.get("type"), form.get("json_schema")
        if kind == "text":
            return {}
        if kind == "json_object":
            return {"json_object": True}
        if kind == "json_schema" and isinstance(inner, Mapping) and isinstance(inner.get("schema"), Mapping):
            return {"json_schema": dict(inner["schema"])}
    raise RequestError(
        'response_format must be {"type": "json_schema", "json_schema": {"schema": ...}}, {"type": "json_object"} or '
        f'{{"type": "text"}}, not {str(form)[:80]}',
        "response_format",
    )
