"""The interface of tool formats. `plan` and `ChatParser` know no more of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from octavo.chat.lark import Lark
from octavo.chat.stages import Next, Start
from octavo.chat.tools import Tool


class ToolFormat(Protocol):
    """How a model is told of tools and how it writes calls."""

    markers: tuple[str, ...]
    """The texts with which calls begin; the first is the one that the model is held to."""
    bare: bool
    """A JSON object at the beginning of an answer is a call too, without a marker."""
    marks: tuple[str, ...]
    """All texts of the format that may be special tokens."""
    shows_tools: bool
    """The template has a section for tools; otherwise `messages` tells of them."""

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Checked messages in the form that the template takes. `tools`: those to tell of, if any."""
        ...

    def calls(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """Add rules for calls of `tools`, one or (if `many`) several; returns an expression for what follows the
        marker."""
        ...

    def start(self, prose: Next, after: Next, known: Collection[str] | None) -> Start:
        """Makes the stage that reads what follows a marker. `prose`: makes the stage for text, if this is no call;
        `after`: the one after calls. `known`: the marker was "{" (see `bare`), and these are the tools."""
        ...


def object_calls(lark: Lark, tools: Sequence[Tool], key: str, more: str = "") -> str:
    """Expression for one call as a JSON object, with its arguments under `key`, and `more` members."""
    calls = []
    for number, tool in enumerate(tools):
        opening = f'{{"name": {json.dumps(tool.name)}, "{key}": '
        arguments = lark.schema(f"arguments_{number}", tool.arguments)
        calls.append(lark.rule(f"call_{number}", f'{json.dumps(opening)} {arguments} {more} "}}"'))
    return f"({' | '.join(calls)})"
