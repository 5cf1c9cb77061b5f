"""Calls as Hermes, Qwen and many others write them: <tool_call>, a JSON object, </tool_call>."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from octavo.chat.calls import Between, ObjectCall
from octavo.chat.formats.base import object_calls
from octavo.chat.history import plain_arguments
from octavo.chat.lark import Lark
from octavo.chat.stages import Next, Start
from octavo.chat.tools import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes:
    """For templates with a tools section of their own."""

    markers: tuple[str, ...] = (BEGIN,)
    bare = False
    marks: tuple[str, ...] = (BEGIN, END)
    shows_tools = True

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        return plain_arguments(messages)

    def calls(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        one = f'"\\n" {object_calls(lark, tools, "arguments")} "\\n" {lark.mark(END)}'
        body = lark.rule("call", one)
        return f'{body} ("\\n" {lark.mark(BEGIN)} {body})*' if many else body

    def start(self, prose: Next, after: Next, known: Collection[str] | None) -> Start:
        return lambda ahead: ObjectCall(ahead, lambda: Between({END: after}, after), prose, closing=END)
