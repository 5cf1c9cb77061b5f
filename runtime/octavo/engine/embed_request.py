"""One text to embed, as the engine sees it. Made by `embedding.py`, moved through `embed_core.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from octavo.outputs import RequestMetrics


class Vector(Protocol):
    """An embedding, as the device's library holds it."""

    def tolist(self) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class EmbedEvent:
    """Engine to caller, once for each text: its embedding, or an error; neither where it was aborted."""

    vector: Vector | None = None
    error: BaseException | None = None


class EmbedRequest:
    """`prompt_ids` are those of a whole text with its special tokens, cut to the model's length. `sink` receives one
    event, on the engine's thread."""

    def __init__(
        self, request_id: str, prompt_ids: Sequence[int], sink: Callable[[EmbedEvent], None], *, truncated: bool = False
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = list(prompt_ids)
        self.sink = sink
        self.truncated = truncated
        self.finished = False
        self.metrics = RequestMetrics(arrival=time.monotonic(), prompt_tokens=len(self.prompt_ids))

    def end(self, event: EmbedEvent) -> None:
        """Send the event, the first time."""
        if not self.finished:
            self.finished = True
            self.metrics.first_token_time = time.monotonic() - self.metrics.arrival
            with suppress(Exception):  # the caller is gone (a closed event loop): nobody waits for it
                self.sink(event)

    def fail(self, error: BaseException) -> None:
        self.end(EmbedEvent(error=error))
