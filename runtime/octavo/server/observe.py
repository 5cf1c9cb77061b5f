"""Where requests report what becomes of them. The server calls these; what measures overrides them.

One `Watch` for each HTTP call that runs in an engine, made by `Observer.begin`. All calls come on the event loop."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.outputs import RequestMetrics


class Watch:
    """Of one call."""

    def tokens(self, count: int) -> None:
        """So many tokens came, now. The first call of these is the first token."""

    def end(self, metrics: Sequence[RequestMetrics], finish_reasons: Sequence[str]) -> None:
        """It is complete. `metrics`: one for each prompt."""

    def error(self, error: BaseException) -> None:
        """It ended otherwise: refused by the engine, failed, or `CancelledError` where the client has gone."""


class Observer:
    """Nobody looks."""

    def begin(self, endpoint: str, model: str, request_id: str) -> Watch:
        """A call that has passed all checks of its form begins."""
        return Watch()
