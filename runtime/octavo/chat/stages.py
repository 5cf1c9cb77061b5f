"""Text and thoughts of an output, read stage by stage. Each stage takes from the source what is certain and names the
stage after it; `ChatParser` runs them.

What a stage gives depends on the text alone, never on where it was cut into pieces: a decision waits until the text
that it depends on is there, or the output has ended.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Protocol

from octavo.chat.deltas import Delta, ParsedMessage, ReasoningDelta, TextDelta, ToolCall, ToolCallDelta
from octavo.chat.scan import Source
from octavo.decode.stop import overlap


class Output:
    """The message so far, and the deltas that are not handed out yet."""

    def __init__(self) -> None:
        self.message = ParsedMessage()
        self.deltas: list[Delta] = []

    def text(self, text: str) -> None:
        if text:
            self.message.content += text
            self.deltas.append(TextDelta(text))

    def reasoning(self, text: str) -> None:
        if text:
            self.message.reasoning = (self.message.reasoning or "") + text
            self.deltas.append(ReasoningDelta(text))

    def call(self, name: str) -> None:
        """A new call begins."""
        call = ToolCall("call_" + secrets.token_hex(12), name)
        self.message.tool_calls.append(call)
        self.deltas.append(ToolCallDelta(len(self.message.tool_calls) - 1, call.id, name))

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if text:
            self.message.tool_calls[-1].arguments += text
            self.deltas.append(ToolCallDelta(len(self.message.tool_calls) - 1, arguments=text))


class Stage(Protocol):
    def read(self, source: Source, out: Output) -> Stage | None:
        """Take what is certain; returns the stage that goes on, or None if more text is needed. Once the source has
        ended, a stage that returns None has taken all."""


Next = Callable[[], Stage]
"""Makes the stage that goes on."""
Start = Callable[[str], Stage]
"""Makes the stage that reads what follows a marker. It is given the marker with the blanks before it, which are text if
this turns out to be no call."""


class Prose:
    """Text up to a marker; blanks before a marker are no part of it.

    `fresh`: leave out blanks at the beginning. `after_call`: and blanks at the end.
    """

    def __init__(self, markers: Mapping[str, Start], *, fresh: bool = False, after_call: bool = False) -> None:
        self._markers, self._fresh, self._after_call = markers, fresh, after_call

    def read(self, source: Source, out: Output) -> Stage | None:
        if self._fresh:
            source.take(source.spaces())
            self._fresh = not source.text
        places = [(place, marker) for marker in self._markers if (place := source.text.find(marker)) >= 0]
        if places:
            place, marker = min(places)
            before = source.take(place)
            text = before.rstrip()
            out.text(text)
            source.take(len(marker))
            return self._markers[marker](before[len(text) :] + marker)
        if not self._markers:
            out.text(source.take(len(source.text)))
        elif not source.ended:
            out.text(source.take(settled(source.text, self._markers)))
        else:
            rest = source.take(len(source.text))
            out.text("" if self._after_call and rest.isspace() else rest)
        return None


class AtStart:
    """What must be decided at the beginning of an answer: does a call begin here?"""

    def __init__(self, markers: Mapping[str, Start], otherwise: Callable[[], Stage]) -> None:
        self._markers, self._otherwise = markers, otherwise

    def read(self, source: Source, out: Output) -> Stage | None:
        rest = source.text.lstrip()
        for marker, start in self._markers.items():
            if rest.startswith(marker):
                return start(source.take(len(source.text) - len(rest) + len(marker)))
        waits = any(marker.startswith(rest) for marker in self._markers)
        return None if waits and not source.ended else self._otherwise()


class Thinking:
    """Thoughts between two marks, at the beginning of an output. `opened`: the prompt wrote the first mark."""

    def __init__(self, marks: tuple[str, str], opened: bool, then: Callable[[bool], Stage]) -> None:
        self._marks, self._opened, self._then = marks, opened, then
        self._inside = self._begun = False

    def read(self, source: Source, out: Output) -> Stage | None:
        begin, end = self._marks
        if not self._inside:
            rest = source.text.lstrip()
            if not rest.startswith(begin) and begin.startswith(rest) and not source.ended:
                return None
            if rest.startswith(begin):
                source.take(source.spaces() + len(begin))
            elif not self._opened:
                return self._then(False)
            self._inside = True
        if not self._begun:
            source.take(source.spaces())
            self._begun = bool(source.text)
        place = source.text.find(end)
        if place >= 0:
            out.reasoning(source.take(place).rstrip())
            source.take(len(end))
            return self._then(True)
        if not source.ended:
            out.reasoning(source.take(settled(source.text, (end,))))
        else:
            out.reasoning(source.take(len(source.text)).rstrip())
        return None


def settled(text: str, markers: Mapping[str, object] | tuple[str, ...]) -> int:
    """Length of `text` without what may be the beginning of a marker, and without the blanks before that."""
    return len(text[: len(text) - overlap(text, markers)].rstrip())
