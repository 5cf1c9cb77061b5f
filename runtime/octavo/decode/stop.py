"""Stop strings in a stream of text pieces. One `StopStrings` per output, on the caller's side. The chat parser holds
its marks back by `overlap` too."""

from __future__ import annotations

from collections.abc import Collection, Sequence


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
        keep = overlap(text, self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of an output that met no stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, markers: Collection[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of one of `markers`."""
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        end = text[-size:]
        if any(marker.startswith(end) and len(marker) > size for marker in markers):
            return size
    return 0
