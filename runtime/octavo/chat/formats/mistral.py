"""Calls as Mistral's models write them, after [TOOL_CALLS]: the older ones a JSON array of calls, the newer ones a name
and its arguments, with a marker before each call."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from octavo.chat.calls import Arguments, Between, Leftover, ObjectCall
from octavo.chat.formats.base import object_calls
from octavo.chat.history import plain_arguments
from octavo.chat.lark import Lark, quoted
from octavo.chat.scan import Source
from octavo.chat.stages import Next, Output, Stage, Start
from octavo.chat.tools import Tool

BEGIN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_LETTERS = string.ascii_letters + string.digits
_HEAD = re.compile(r"\s*([^\s\[\]{}\"]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*")
_NAMED = re.compile(r"\[TOOL_CALLS\]['\"]\s*[+~][^+~}]*\bname\b")


class Mistral:
    """`template` decides which of the ways to write calls the model knows."""

    markers: tuple[str, ...] = (BEGIN,)
    bare = False
    marks: tuple[str, ...] = (BEGIN, CALL_ID, ARGS)
    shows_tools = True

    def __init__(self, template: str) -> None:
        self._array = ARGS not in template and _NAMED.search(template) is None
        self._between = [mark for mark in (CALL_ID, ARGS) if mark in template]

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        shaped = plain_arguments(messages)
        for message in shaped:
            if message.get("tool_call_id"):
                message["tool_call_id"] = short_id(message["tool_call_id"])
            for number, call in enumerate(message.get("tool_calls") or ()):
                call["id"] = short_id(call.get("id") or str(number))
        return shaped

    def calls(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        if self._array:
            end = lark.rule("ID", '/, "id": "[a-zA-Z0-9]{9}"/')
            one = lark.rule("call", object_calls(lark, tools, "arguments", f"{end}?"))
            return f'/ ?\\[/ {one} (", " {one})* "]"' if many else f'/ ?\\[/ {one} "]"'
        between = "".join(f"{lark.mark(mark)} " + ("ID " if mark == CALL_ID else "") for mark in self._between)
        lark.rule("ID", "/[a-zA-Z0-9]{9}/")
        one = lark.rule("call", " | ".join(
            f"{quoted(tool.name)} {between}{lark.schema(f'arguments_{number}', tool.arguments)}"
            for number, tool in enumerate(tools)
        ))  # fmt: skip
        return f"{one} ({lark.mark(BEGIN)} {one})*" if many else one

    def start(self, prose: Next, after: Next, known: Collection[str] | None) -> Start:
        return lambda ahead: _Calls(ahead, prose, after)


class _Calls:
    """Which of the ways is it?"""

    def __init__(self, ahead: str, prose: Next, after: Next) -> None:
        self._ahead, self._prose, self._after = ahead, prose, after

    def read(self, source: Source, out: Output) -> Stage | None:
        rest = source.text.lstrip()
        if not rest and not source.ended:
            return None
        if not rest.startswith("["):
            return _NamedCall(self._ahead, self._prose, self._after)
        ahead = self._ahead + source.take(source.spaces() + 1)
        return ObjectCall(ahead, self._next, self._prose)

    def _next(self) -> Stage:
        more = ObjectCall(",", self._next, self._prose)
        return Between({",": lambda: more, "]": self._after}, self._after)


class _NamedCall:
    """A name, and perhaps marks, before the arguments."""

    def __init__(self, ahead: str, prose: Next, after: Next) -> None:
        self._ahead, self._prose, self._after = ahead, prose, after

    def read(self, source: Source, out: Output) -> Stage | None:
        head, brace, _ = source.text.partition("{")
        found = _HEAD.fullmatch(head)
        if brace and found:
            source.take(len(head))
            out.call(found[1])
            return Arguments(self._after, lambda: Leftover(None, self._after))
        if brace or source.ended or len(head.split()) > 1:
            if head.strip() or brace:  # otherwise cut at its marker
                out.text(self._ahead)
            return self._prose()
        return None


def short_id(call_id: str) -> str:
    """An id of nine letters and digits, as the templates want it; the same for the same id."""
    if len(call_id) == 9 and call_id.isalnum() and call_id.isascii():
        return call_id
    digest = hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=9).digest()
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest)
