"""A conversation as the chat app keeps it: what was said, raw. What the browser stores, what is downloaded and what is
shown are made from it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from octavo_apps.markdown import defused, fused

TITLE_LENGTH = 40
THINKING = "Thoughts"


@dataclass
class Turn:
    """What one side said. `note` is a sentence about how an answer ended, where it did not end by itself."""

    role: Literal["user", "assistant"]
    content: str = ""
    thinking: str = ""
    note: str = ""
    complete: bool = True


@dataclass
class Conversation:
    """Turns, from the user's first; `id` names it in the browser's storage, and is given with the first question."""

    id: str = ""
    turns: list[Turn] = field(default_factory=list)
    system: str = ""
    changed: float = 0.0

    @property
    def title(self) -> str:
        """The beginning of the first message."""
        first = " ".join(self.turns[0].content[: 4 * TITLE_LENGTH].split()) if self.turns else "New chat"
        return first if len(first) <= TITLE_LENGTH else first[: TITLE_LENGTH - 1].rstrip() + "…"

    def ask(self, text: str) -> None:
        self.id = self.id or secrets.token_hex(8)
        self.turns.append(Turn("user", text))
        self.changed = time.time()

    def back_to_question(self) -> None:
        """Forget the last answer, so that the last question stands at the end."""
        while self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()

    def undo(self) -> str:
        """Forget the last question and its answer. Returns the question."""
        self.back_to_question()
        return self.turns.pop().content if self.turns else ""

    def messages(self) -> list[dict[str, str]]:
        """For the model: without thoughts and notes. An answer that failed before its first word is left out, with its
        question."""
        said = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        kept: list[dict[str, str]] = []
        for message in said:
            if message["role"] == "assistant" and not message["content"]:
                kept.pop()
            else:
                kept.append(message)
        return ([{"role": "system", "content": self.system}] if self.system.strip() else []) + kept

    # ---------------------------------------------------------------- what is shown

    def shown(self) -> list[dict[str, Any]]:
        """Messages for Gradio's chatbot. Whatever was written is defused: it cannot bring HTML or pictures."""
        return [message for turn in self.turns for message in _shown(turn)]

    def turn_at(self, place: int) -> int:
        """The number of the turn to which the message belongs that is shown at `place`."""
        for number, turn in enumerate(self.turns):
            place -= len(_shown(turn))
            if place < 0:
                return number
        raise IndexError(place)

    def edit(self, place: int, shown: str) -> None:
        """The user changed the question at `place` to what is `shown` now: all that came after it is forgotten."""
        number = self.turn_at(place)
        del self.turns[number:]
        self.ask(fused(shown).strip())

    # ---------------------------------------------------------------- what is kept

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises `ValueError` for what is no conversation: the browser's storage is the user's to change."""
        try:
            kept: Mapping[str, Any] = json.loads(text)
            turns = [Turn(**turn) for turn in kept["turns"]]
            new = cls(str(kept["id"]), turns, str(kept["system"]), float(kept["changed"]))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a conversation: {error}") from error
        if not all(turn.role in ("user", "assistant") and isinstance(turn.content, str) for turn in turns):
            raise ValueError("not a conversation: turns belong to the user or the assistant")
        return new

    def to_markdown(self) -> str:
        """For reading: headings say who speaks."""
        parts = [f"# {self.title}"]
        if self.system.strip():
            parts += ["## System", self.system.strip()]
        for turn in self.turns:
            parts += ["## You" if turn.role == "user" else "## Assistant", turn.content.strip()]
            parts += [f"*{turn.note}*"] if turn.note else []
        return "\n\n".join(parts) + "\n"


def _shown(turn: Turn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if turn.thinking:
        status = "done" if turn.content or turn.complete else "pending"
        folded = {"title": THINKING, "status": status}
        messages.append({"role": turn.role, "content": defused(turn.thinking), "metadata": folded})
    content = defused(turn.content)
    if turn.note:
        content = f"{content}\n\n*{defused(turn.note)}*" if content else f"*{defused(turn.note)}*"
    if content or not turn.thinking:
        messages.append({"role": turn.role, "content": content or "…"})
    return messages
