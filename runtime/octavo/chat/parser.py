"""`ChatParser`: from the text of one output, as it comes, to content, reasoning and tool calls. Made by
`ChatPlan.parser`."""

from __future__ import annotations

import re

from octavo.chat.deltas import Delta, ParsedMessage
from octavo.chat.scan import Source
from octavo.chat.stages import Output, Stage


class ChatParser:
    """Reads one output. `push` pieces of its text, then `finish`; `message` is everything so far.

    What may be the beginning of a mark (`<tool_call>`, `</think>`) is held back until it is certain. Arguments of calls
    are handed out as they come. Nothing is lost: a call that is cut keeps its arguments so far, and what looked like a
    call but is none is text.
    """

    def __init__(self, first: Stage, unwanted: frozenset[str] = frozenset()) -> None:
        """`unwanted`: texts of special tokens that are no part of any message."""
        self._stage, self._source, self._out = first, Source(), Output()
        self._filter = _Filter(unwanted) if unwanted else None

    @property
    def message(self) -> ParsedMessage:
        return self._out.message

    def push(self, text: str) -> list[Delta]:
        """Take in more text. Returns what it adds to the message."""
        self._source.text += self._filter.push(text) if self._filter else text
        return self._run()

    def finish(self) -> list[Delta]:
        """The output has ended: returns what was held back."""
        if self._filter:
            self._source.text += self._filter.held
            self._filter.held = ""
        self._source.ended = True
        return self._run()

    def _run(self) -> list[Delta]:
        while (stage := self._stage.read(self._source, self._out)) is not None:
            self._stage = stage
        deltas, self._out.deltas = self._out.deltas, []
        return deltas


class _Filter:
    """Takes special tokens out of a text."""

    def __init__(self, unwanted: frozenset[str]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, sorted(unwanted, key=len, reverse=True))))
        self._beginnings = {text[:size] for text in unwanted for size in range(1, len(text))}
        self._longest = max(map(len, unwanted)) - 1
        self.held = ""

    def push(self, text: str) -> str:
        kept, end = [], 0
        text = self.held + text
        for match in self._pattern.finditer(text):
            kept.append(text[end : match.start()])
            end = match.end()
        rest = text[end:]
        sizes = range(min(self._longest, len(rest)), 0, -1)
        keep = next((size for size in sizes if rest[-size:] in self._beginnings), 0)
        self.held = rest[len(rest) - keep :]
        return "".join(kept) + rest[: len(rest) - keep]
