"""Calls as Llama 3 writes them: an answer that is one JSON object, with or without <|python_tag|> before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from octavo.chat.calls import ObjectCall
from octavo.chat.history import one_call_each, plain_arguments
from octavo.chat.lark import Lark
from octavo.chat.stages import Next, Start
from octavo.chat.tools import Tool

TAG = "<|python_tag|>"


class Llama:
    """An answer has one call at most, whatever `many` says: the templates know no more. Text that begins with "{" is
    not possible beside it, because nothing would tell the two apart."""

    markers: tuple[str, ...] = (TAG,)
    bare = True
    marks: tuple[str, ...] = (TAG,)
    shows_tools = True

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        return one_call_each(plain_arguments(messages))

    def calls(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        # whole JSON documents: the library can tell them from other JSON that begins alike, which text it could not
        return lark.rule("call", " | ".join(
            lark.schema(f"call_{number}", {
                "type": "object", "properties": {"name": {"const": tool.name}, "parameters": within(tool.arguments)},
                "required": ["name", "parameters"], "additionalProperties": False,
            })
            for number, tool in enumerate(tools)
        ))  # fmt: skip

    def start(self, prose: Next, after: Next, known: Collection[str] | None) -> Start:
        return lambda ahead: ObjectCall(ahead, after, prose, known=known)


def within(schema: Any) -> Any:
    """The schema of arguments as a part of a call's, at which its references then point."""
    if isinstance(schema, list):
        return [within(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {name: within(part) for name, part in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = "#/properties/parameters" + reference[1:]
    return moved
