"""200 random traces on a tiny real model in tiny pools: every request equals its solo run. `benchmarks/traces.py` runs
any number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trace_cases import Bench, Totals


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_request_equals_its_solo_run(tiny_model: Path, dtype: torch.dtype) -> None:
    bench = Bench(tiny_model, dtype)
    totals = Totals()
    try:
        for seed in range(100):
            bench.trace(seed, totals)
    finally:
        bench.close()
    assert totals.traces == 100
    assert totals.preemptions > 100, "the pools were not short: little was shown"
    assert totals.cached_tokens > 1000, "nothing was found in the cache"
    assert totals.aborted > 10
    assert totals.failures > 10
    assert totals.seen == {"stop", "length"}
