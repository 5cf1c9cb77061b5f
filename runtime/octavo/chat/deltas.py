"""What a parser of chat output gives: pieces as they come, and the message they make. Read by the doors."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of call number `index` (from 0). `id` and `name` come with the first piece of a call; `arguments` is a piece
    of JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Delta = TextDelta | ReasoningDelta | ToolCallDelta


@dataclass(slots=True)
class ToolCall:
    """A call of a tool. `arguments` is JSON text: an object, unless the output was cut inside it."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedMessage:
    """An assistant's message. `reasoning` is None where there was none."""

    content: str = ""
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
