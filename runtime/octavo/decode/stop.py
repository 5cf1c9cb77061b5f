"""Stop strings in a stream of text pieces. One `StopStrings` per output, on the caller's side."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.stops = tuple(stops)
        self.include = include
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain now. Sets `found` when a stop string is complete; then nothing more comes."""
        if not self.stops or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        hits = [(place, stop) for stop in self.stops if (place := text.find(stop)) >= 0]
        if hits:
            place, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return text[: place + len(self.found)] if self.include else text[:place]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of an output that met no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
