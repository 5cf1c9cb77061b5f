"""The page that Prometheus reads, and the dashboard's queries asked of a real Prometheus."""

from __future__ import annotations

import random
import time

import pytest
from octavo.engine.contract import EngineStats
from octavo.outputs import RequestMetrics
from octavo.server.histogram import SECONDS, Histogram
from octavo.server.metrics import EngineReport, Metrics
from prometheus_client.parser import text_string_to_metric_families

STATS = EngineStats(
    running=3, waiting=2, blocks_total=100, blocks_used=25, blocks_cached=15, blocks_free=60, preemptions=4, steps=7,
    largest_batch=3,
)  # fmt: skip


def values(page: bytes) -> dict[tuple[str, ...], float]:
    """By name and the labels' values."""
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_a_histogram_counts_as_a_sorted_list_does() -> None:
    rng, histogram = random.Random(3), Histogram()
    seen = [rng.choice([*SECONDS, rng.expovariate(1.0), 1e4]) for _ in range(500)]
    for value in seen:
        histogram.observe(value)
    for end, count in histogram.buckets:
        assert count == sum(value <= float(end) for value in seen)
    assert histogram.sum == pytest.approx(sum(seen))
    assert histogram.buckets[-1] == ("+Inf", 500.0)


def test_a_request_and_an_engine_are_on_the_page() -> None:
    metrics = Metrics()
    watch = metrics.watch("smol")
    watch.tokens(1)
    watch.tokens(1)  # of another output, of the same step
    time.sleep(0.001)
    watch.tokens(3)
    watch.end([RequestMetrics(0.0, 0.5, 2.0, 4.0, 12, 8, 5, 1)], ["stop", "length"])
    metrics.watch("smol").error(ValueError("no"))
    metrics.replied("/v1/completions", 200)
    found = values(metrics.page({"smol": EngineReport(STATS, restarts=2), "away": EngineReport(None, restarts=1)}))
    expected = {
        ("vllm:prompt_tokens_total", "smol"): 12, ("vllm:generation_tokens_total", "smol"): 5,
        ("vllm:prefix_cache_queries_total", "smol"): 12, ("vllm:prefix_cache_hits_total", "smol"): 8,
        ("vllm:request_success_total", "stop", "smol"): 1, ("vllm:request_success_total", "length", "smol"): 1,
        ("vllm:request_success_total", "abort", "smol"): 0, ("octavo:request_errors_total", "ValueError", "smol"): 1,
        ("vllm:time_to_first_token_seconds_count", "smol"): 1,
        ("vllm:inter_token_latency_seconds_count", "smol"): 1, ("vllm:request_queue_time_seconds_sum", "smol"): 0.5,
        ("vllm:request_prefill_time_seconds_sum", "smol"): 1.5, ("vllm:request_decode_time_seconds_sum", "smol"): 2.0,
        ("vllm:request_inference_time_seconds_sum", "smol"): 3.5,
        ("vllm:request_time_per_output_token_seconds_sum", "smol"): 0.5,
        ("vllm:num_requests_running", "smol"): 3, ("vllm:num_requests_waiting", "smol"): 2,
        ("vllm:kv_cache_usage_perc", "smol"): 0.25, ("vllm:num_preemptions_total", "smol"): 4,
        ("octavo:engine_steps_total", "smol"): 7, ("octavo:kv_blocks", "smol", "cached"): 15,
        ("octavo:engine_up", "smol"): 1, ("octavo:engine_up", "away"): 0, ("octavo:engine_restarts_total", "away"): 1,
        ("octavo:http_requests_total", "/v1/completions", "200"): 1,
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert ("vllm:num_requests_running", "away") not in found, "an engine that does not answer has no figures"
    assert found["process_open_fds",] > 0
