"""What Prometheus reads at `/metrics`: under vLLM's names what means the same there, so that its dashboards work, and
under `octavo:` what is ours.

The doors report each request through a `Watch`; what the engines know themselves (queue, cache, steps) is asked of them
when the page is read, with `Engines` as the answer. Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from octavo.server.histogram import Histogram

if TYPE_CHECKING:
    from octavo.engine.contract import EngineStats
    from octavo.outputs import RequestMetrics

_TOGETHER = 1e-4
"""Seconds: the events of one step are taken in one after the other, some microseconds each."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TIMES = {
    "vllm:time_to_first_token_seconds": "From the arrival of a request to its first token.",
    "vllm:inter_token_latency_seconds": "Between two tokens of a request.",
    "vllm:request_time_per_output_token_seconds": "Mean time between tokens after the first, one value a request.",
    "vllm:e2e_request_latency_seconds": "From the arrival of a request to its end.",
    "vllm:request_queue_time_seconds": "From the arrival of a request to its first step.",
    "vllm:request_prefill_time_seconds": "From the first step of a request to its first token.",
    "vllm:request_decode_time_seconds": "From the first token of a request to its last.",
    "vllm:request_inference_time_seconds": "From the first step of a request to its last token.",
}


@dataclass(slots=True)
class _Model:
    """What was counted of one model."""

    times: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in TIMES})
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    """Outputs by finish reason."""
    errors: Counter[str] = field(default_factory=Counter)
    """Requests by the name of the error that ended them."""


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What one engine answered when the page was read."""

    stats: EngineStats | None
    """None: it does not answer now, as it is started anew."""
    restarts: int = 0


class Watch:
    """One call, as it is seen by the door that answers it. `tokens` as they come, then `end` or `error`, once."""

    __slots__ = ("_arrival", "_last", "_model")

    def __init__(self, model: _Model) -> None:
        self._model = model
        self._arrival = time.monotonic()
        self._last: float | None = None

    def tokens(self, count: int) -> None:
        """`count` new tokens. Those that come together, of a speculating step or of several outputs, count as one for
        the time since the last."""
        now, model = time.monotonic(), self._model
        model.output_tokens += count
        if self._last is None:
            model.times["vllm:time_to_first_token_seconds"].observe(now - self._arrival)
        elif now - self._last > _TOGETHER:
            model.times["vllm:inter_token_latency_seconds"].observe(now - self._last)
        self._last = now

    def end(self, metrics: Sequence[RequestMetrics], reasons: Sequence[str]) -> None:
        """The call has ended; `metrics` of its prompts, `reasons` of their outputs."""
        self._model.ended.update(reasons)
        self._model.times["vllm:e2e_request_latency_seconds"].observe(time.monotonic() - self._arrival)
        for one in metrics:
            self._count(one)

    def _count(self, metrics: RequestMetrics) -> None:
        model, times = self._model, self._model.times
        model.prompt_tokens += metrics.prompt_tokens
        model.cached_tokens += metrics.cached_tokens
        first, last, queued = metrics.first_token_time, metrics.last_token_time, metrics.queue_time
        if queued is not None:
            times["vllm:request_queue_time_seconds"].observe(queued)
        if metrics.prefill_time is not None:
            times["vllm:request_prefill_time_seconds"].observe(metrics.prefill_time)
        if first is not None and last is not None:
            times["vllm:request_decode_time_seconds"].observe(last - first)
            times["vllm:request_inference_time_seconds"].observe(last - (queued or 0.0))
        if metrics.time_per_token is not None:
            times["vllm:request_time_per_output_token_seconds"].observe(metrics.time_per_token)

    def error(self, error: BaseException) -> None:
        """The request ended with an error, whoever's fault it was."""
        self._model.errors[type(error).__name__] += 1


class Metrics(Collector):
    """The counts of one server."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        self._replies: Counter[tuple[str, str]] = Counter()
        self._engines: Mapping[str, EngineReport] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def watch(self, model: str) -> Watch:
        """A request for `model`, by the first of its served names, has arrived."""
        return Watch(self._models.setdefault(model, _Model()))

    def replied(self, route: str, status: int) -> None:
        """A reply was begun. `route` is the router's pattern, never the path that was asked for: anyone could fill the
        memory with made-up paths."""
        self._replies[route, str(status)] += 1

    def page(self, engines: Mapping[str, EngineReport]) -> bytes:
        """The page, in Prometheus' text format. `engines`: what they answered just now, by model."""
        self._engines = engines
        for model in engines:
            self._models.setdefault(model, _Model())
        return generate_latest(self._registry)

    # ---------------------------------------------------------------- prometheus_client's side

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._of_requests()
        yield from self._of_engines()
        replies = CounterMetricFamily("octavo:http_requests", "Replies begun.", labels=["route", "status"])
        for (route, status), count in self._replies.items():
            replies.add_metric([route, status], count)
        yield replies
        tasks = len(asyncio.all_tasks()) if _runs_a_loop() else 0
        yield GaugeMetricFamily("octavo:tasks", "Tasks of the server's event loop.", tasks)

    def _of_requests(self) -> Iterator[Metric]:
        one = ["model_name"]
        prompt = CounterMetricFamily("vllm:prompt_tokens", "Tokens of prompts.", labels=one)
        made = CounterMetricFamily("vllm:generation_tokens", "Tokens made.", labels=one)
        asked = CounterMetricFamily("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", labels=one)
        found = CounterMetricFamily("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", labels=one)
        ended = CounterMetricFamily(
            "vllm:request_success", "Outputs that ended, by reason.", labels=[*one, "finished_reason"]
        )
        errors = CounterMetricFamily("octavo:request_errors", "Requests that failed.", labels=[*one, "error"])
        for name, model in self._models.items():
            prompt.add_metric([name], model.prompt_tokens)
            asked.add_metric([name], model.prompt_tokens)
            found.add_metric([name], model.cached_tokens)
            made.add_metric([name], model.output_tokens)
            for reason in sorted({"stop", "length", "abort", *model.ended}):
                ended.add_metric([name, reason], model.ended[reason])
            for error in sorted({"QueueFullError", "RequestError", "RequestFailedError", *model.errors}):
                errors.add_metric([name, error], model.errors[error])
        yield from (prompt, made, asked, found, ended, errors)
        for title, what in TIMES.items():
            family = HistogramMetricFamily(title, what, labels=one)
            for name, model in self._models.items():
                family.add_metric([name], model.times[title].buckets, model.times[title].sum)
            yield family

    def _of_engines(self) -> Iterator[Metric]:
        one = ["model_name"]
        up = GaugeMetricFamily("octavo:engine_up", "1 while the engine answers.", labels=one)
        restarts = CounterMetricFamily("octavo:engine_restarts", "Times that the engine was replaced.", labels=one)
        running = GaugeMetricFamily("vllm:num_requests_running", "Sequences in the batch.", labels=one)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences that wait.", labels=one)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.", labels=one)
        preempted = CounterMetricFamily("vllm:num_preemptions", "Sequences that gave way.", labels=one)
        steps = CounterMetricFamily("octavo:engine_steps", "Steps of the model.", labels=one)
        largest = GaugeMetricFamily("octavo:largest_batch", "Most sequences that one step advanced.", labels=one)
        blocks = GaugeMetricFamily("octavo:kv_blocks", "Blocks of the KV cache by state.", labels=[*one, "state"])
        for name, report in self._engines.items():
            stats = report.stats
            up.add_metric([name], float(stats is not None))
            restarts.add_metric([name], report.restarts)
            if stats is None:
                continue
            running.add_metric([name], stats.running)
            waiting.add_metric([name], stats.waiting)
            usage.add_metric([name], stats.blocks_used / max(stats.blocks_total, 1))
            preempted.add_metric([name], stats.preemptions)
            steps.add_metric([name], stats.steps)
            largest.add_metric([name], stats.largest_batch)
            for state in ("used", "cached", "free"):
                blocks.add_metric([name, state], getattr(stats, f"blocks_{state}"))
        yield from (up, restarts, running, waiting, usage, preempted, steps, largest, blocks)


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
