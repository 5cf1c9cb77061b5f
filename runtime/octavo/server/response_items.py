"""Output items of the responses API, and the events that tell of them. Used by `responses`, whole or streamed alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from octavo.chat import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from octavo.server.call import new_id

Event = dict[str, Any]


class Items:
    """The items of one answer: thoughts, text, calls. Each begins when the kind of what comes changes."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self._open: _Item | None = None

    def take(self, deltas: Iterable[Delta]) -> list[Event]:
        """What more of the answer means."""
        events: list[Event] = []
        for delta in deltas:
            if self._open is None or not self._open.goes_on(delta):
                events += self.close()
                self._open = _item(delta, len(self.all))
                self.all.append(self._open.item)
                events += self._open.begin()
            events += self._open.more(delta)
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """The item that is open has ended."""
        item, self._open = self._open, None
        return [] if item is None else item.end(status)


class _Item:
    """One item, as it grows."""

    prefix = ""

    def __init__(self, place: int, **fields: Any) -> None:
        self.item = {"id": f"{self.prefix}_{new_id()}", "status": "in_progress", **fields}
        self._place = place

    def goes_on(self, delta: Delta) -> bool:
        raise NotImplementedError

    def more(self, delta: Any) -> list[Event]:
        raise NotImplementedError

    def begin(self) -> list[Event]:
        return [self._whole("response.output_item.added")]

    def end(self, status: str) -> list[Event]:
        self.item["status"] = status
        return [self._whole("response.output_item.done")]

    def _whole(self, kind: str) -> Event:
        return {"type": kind, "output_index": self._place, "item": _copy(self.item)}

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": kind, "item_id": self.item["id"], "output_index": self._place, **more}


class _Message(_Item):
    prefix = "msg"

    def __init__(self, place: int) -> None:
        super().__init__(place, type="message", role="assistant", content=[])
        self._part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}

    def goes_on(self, delta: Delta) -> bool:
        return isinstance(delta, TextDelta)

    def begin(self) -> list[Event]:
        added = super().begin()
        self.item["content"] = [self._part]
        part = self._event("response.content_part.added", content_index=0, part=dict(self._part))
        return [*added, part]

    def more(self, delta: TextDelta) -> list[Event]:
        self._part["text"] += delta.text
        return [self._event("response.output_text.delta", content_index=0, delta=delta.text, logprobs=[])]

    def end(self, status: str) -> list[Event]:
        text = self._part["text"]
        return [
            self._event("response.output_text.done", content_index=0, text=text, logprobs=[]),
            self._event("response.content_part.done", content_index=0, part=dict(self._part)),
            *super().end(status),
        ]


class _Reasoning(_Item):
    prefix = "rs"

    def __init__(self, place: int) -> None:
        super().__init__(place, type="reasoning", summary=[], content=[])
        self._part = {"type": "reasoning_text", "text": ""}

    def goes_on(self, delta: Delta) -> bool:
        return isinstance(delta, ReasoningDelta)

    def begin(self) -> list[Event]:
        added = super().begin()
        self.item["content"] = [self._part]
        return [*added, self._event("response.content_part.added", content_index=0, part=dict(self._part))]

    def more(self, delta: ReasoningDelta) -> list[Event]:
        self._part["text"] += delta.text
        return [self._event("response.reasoning_text.delta", content_index=0, delta=delta.text)]

    def end(self, status: str) -> list[Event]:
        return [
            self._event("response.reasoning_text.done", content_index=0, text=self._part["text"]),
            self._event("response.content_part.done", content_index=0, part=dict(self._part)),
            *super().end(status),
        ]


class _Call(_Item):
    prefix = "fc"

    def __init__(self, place: int, delta: ToolCallDelta) -> None:
        call_id = delta.id or f"call_{new_id()}"
        super().__init__(place, type="function_call", call_id=call_id, name=delta.name or "", arguments="")
        self._index = delta.index

    def goes_on(self, delta: Delta) -> bool:
        return isinstance(delta, ToolCallDelta) and delta.index == self._index

    def more(self, delta: ToolCallDelta) -> list[Event]:
        if not delta.arguments:
            return []
        self.item["arguments"] += delta.arguments
        return [self._event("response.function_call_arguments.delta", delta=delta.arguments)]

    def end(self, status: str) -> list[Event]:
        arguments, name = self.item["arguments"], self.item["name"]
        done = self._event("response.function_call_arguments.done", arguments=arguments, name=name)
        return [done, *super().end(status)]


def _item(delta: Delta, place: int) -> _Item:
    if isinstance(delta, TextDelta):
        return _Message(place)
    return _Reasoning(place) if isinstance(delta, ReasoningDelta) else _Call(place, delta)


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now."""
    if "content" not in item:
        return dict(item)
    return {**item, "content": [dict(part) for part in item["content"]]}
