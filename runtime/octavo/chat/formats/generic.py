"""For templates that know nothing of tools: a system message tells of them, and earlier calls and their results are
written out as text. Calls have the form of Hermes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.chat.formats.hermes import Hermes
from octavo.chat.history import spelled_out, tell_of_tools


class Generic(Hermes):
    shows_tools = False

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        return tell_of_tools(spelled_out(messages), tools)
