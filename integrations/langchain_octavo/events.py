"""LangChain's event protocol of content blocks (`stream_events(version="v3")`), made from a request's pieces directly.

message-start, then for each block start, deltas and finish, then message-finish.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from octavo.chat import Delta, ReasoningDelta, TextDelta
from octavo.outputs import StreamPiece

from langchain_octavo.chunks import Answer, Blocks, call_block
from langchain_octavo.results import PROVIDER, usage

Event = dict[str, Any]


class Events:
    """The events of one message."""

    def __init__(self, answer: Answer, message_id: str) -> None:
        self.answer, self.message_id = answer, message_id
        self.blocks = Blocks()
        self._begun: dict[int, Event] = {}
        """Content so far of each block, by its number."""
        self._open: list[int] = []
        self._logprobs: list[Any] = []

    def start(self) -> Event:
        metadata = {"provider": PROVIDER, "model": self.answer.model}
        return {"event": "message-start", "role": "ai", "id": self.message_id, "metadata": metadata}

    def of(self, piece: StreamPiece, deltas: list[Delta]) -> Iterator[Event]:
        """What `piece` says."""
        for delta in deltas:
            yield from self._delta(delta)
        info = self.answer.info(piece) if piece.logprobs is not None or self.answer.ended else None
        if info is not None and "logprobs" in info:
            self._logprobs += info.pop("logprobs")["content"]
        if self.answer.ended:
            yield from self._end(info or {})

    def _delta(self, delta: Delta) -> Iterator[Event]:
        place, first = self.blocks.place(delta)
        if first:
            yield from self._finish(text_only=True)
            self._begun[place] = _empty(delta)
            self._open.append(place)
            yield {"event": "content-block-start", "index": place, "content": dict(self._begun[place])}
        said = _said(delta)
        key, text = said.popitem()
        if text:
            self._begun[place][key] += text
            yield {"event": "content-block-delta", "index": place, "delta": {"type": _KINDS[key], key: text}}

    def _finish(self, *, text_only: bool) -> Iterator[Event]:
        """End the open blocks; those of tool calls may still grow while others come."""
        for place in list(self._open):
            block = self._begun[place]
            if text_only and block["type"] == "tool_call_chunk":
                continue
            self._open.remove(place)
            yield {"event": "content-block-finish", "index": place, "content": _final(block)}

    def _end(self, info: dict[str, Any]) -> Iterator[Event]:
        yield from self._finish(text_only=False)
        if self._logprobs:
            info = {**info, "logprobs": {"content": self._logprobs}}
        yield {"event": "message-finish", "metadata": info, "usage": usage(self.answer.metrics)}


_KINDS = {"text": "text-delta", "reasoning": "reasoning-delta", "args": "tool-call-delta"}


def _said(delta: Delta) -> dict[str, str]:
    if isinstance(delta, TextDelta):
        return {"text": delta.text}
    return {"reasoning": delta.text} if isinstance(delta, ReasoningDelta) else {"args": delta.arguments}


def _empty(delta: Delta) -> Event:
    if isinstance(delta, TextDelta):
        return {"type": "text", "text": ""}
    if isinstance(delta, ReasoningDelta):
        return {"type": "reasoning", "reasoning": ""}
    return {"type": "tool_call_chunk", "id": delta.id, "name": delta.name, "args": "", "index": delta.index}


def _final(block: Event) -> Event:
    if block["type"] != "tool_call_chunk":
        return dict(block)
    return dict(call_block(block["id"], block["name"], block["args"]))
