"""Where requests report what becomes of them: to the metrics, to the trace if there is one, and to the log.

One `Watch` for each HTTP call that runs in an engine, made by `Observer.begin`. All calls come on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

from octavo.outputs import RequestMetrics
from octavo.server import metrics as page
from octavo.server.metrics import EngineReport, Metrics
from octavo.server.models import Loaded
from octavo.server.tracing import NoTracer, Span, Tracer

logger = logging.getLogger("octavo.server")
_ASKED_BY_PROGRAMS = frozenset({"/health", "/ready", "/metrics"})
"""Every few seconds, which would fill the log."""
STATS_SECONDS = 2.0
"""An engine that does not say within this how it is counts as one that does not answer."""


class Watch:
    """Of one call."""

    __slots__ = ("_counts", "_request_id", "_span", "tokens")

    def __init__(self, request_id: str, counts: page.Watch, span: Span) -> None:
        self._request_id, self._counts, self._span = request_id, counts, span
        self.tokens = counts.tokens
        """`tokens(count)`: so many came, now. The first call of these is the first token."""

    def end(self, metrics: Sequence[RequestMetrics], finish_reasons: Sequence[str]) -> None:
        """It is complete. `metrics`: one for each prompt."""
        self._counts.end(metrics, finish_reasons)
        self._span.end(metrics, finish_reasons)
        first = metrics[0].first_token_time if metrics else None
        logger.info("completed", extra={
            "request_id": self._request_id, "prompt_tokens": sum(one.prompt_tokens for one in metrics),
            "cached_tokens": sum(one.cached_tokens for one in metrics),
            "output_tokens": sum(one.output_tokens for one in metrics), "finish_reasons": list(finish_reasons),
            "first_token_seconds": None if first is None else round(first, 4),
        })  # fmt: skip

    def error(self, error: BaseException) -> None:
        """It ended otherwise: refused by the engine, failed, or `CancelledError` where the client has gone."""
        self._counts.error(error)
        self._span.error(error)
        # its name alone: a message may quote the prompt
        logger.info("not completed", extra={"request_id": self._request_id, "error": type(error).__name__})


class Observer:
    """Of one server."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._metrics, self._tracer = Metrics(), tracer or NoTracer()

    def begin(self, endpoint: str, model: str, request_id: str, headers: Mapping[str, str]) -> Watch:
        """A call that has passed all checks of its form begins."""
        return Watch(
            request_id, self._metrics.watch(model), self._tracer.begin(endpoint, model, request_id, headers)
        )

    def replied(self, request_id: str, method: str, route: str, status: int, began: float) -> None:
        """A reply has ended. `route`: the router's pattern; `began`: by `time.monotonic()`."""
        self._metrics.replied(route, status)
        seconds = round(time.monotonic() - began, 4)
        logger.log(logging.DEBUG if route in _ASKED_BY_PROGRAMS else logging.INFO, "replied", extra={
            "request_id": request_id, "method": method, "route": route, "status": status, "seconds": seconds,
        })  # fmt: skip

    async def page(self, loaded: Sequence[Loaded]) -> bytes:
        """For Prometheus. Asks the engines of these models how they are."""
        reports = await asyncio.gather(*map(_report, loaded))
        return self._metrics.page({one.name: report for one, report in zip(loaded, reports, strict=True)})

    def close(self) -> None:
        """Send what is still to be sent. Blocks."""
        self._tracer.close()


async def _report(loaded: Loaded) -> EngineReport:
    try:
        async with asyncio.timeout(STATS_SECONDS):
            stats = await asyncio.to_thread(loaded.llm.stats)
    except Exception as error:
        logger.warning("an engine does not answer", extra={"model": loaded.name, "error": type(error).__name__})
        return EngineReport(None, loaded.restarts)
    return EngineReport(stats, loaded.restarts)
