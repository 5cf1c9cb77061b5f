"""Some seeds of the traces of `http_traces.py`, on a tiny model in a small KV cache. `benchmarks/server_traces.py` runs
any number of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
from http_traces import Bench, Totals  # type: ignore[import-not-found]
from serving_helpers import program  # type: ignore[import-not-found]

OPTIONS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--device", "cpu", "--deterministic", "--num-blocks", "33",
    "--block-size", "16", "--max-num-seqs", "5", "--log-level", "warning",
)  # fmt: skip


def test_answers_are_those_given_alone_and_nothing_is_held_afterwards(tiny_model: Path) -> None:
    totals = Totals()
    with program("--model", str(tiny_model), *OPTIONS) as running:
        parent = psutil.Process(running.process.pid)
        bench = Bench(running.url, "tiny", [parent, *parent.children(recursive=True)], vocabulary=300)
        asyncio.run(bench.trace(0, totals))
        before = bench.held()  # threads of pools and files of libraries are there now
        for seed in range(1, 13):
            asyncio.run(bench.trace(seed, totals))
        after = bench.held()
    assert after.tasks <= before.tasks
    assert after.threads <= before.threads + 2, "a pool of asyncio may have grown"
    assert after.descriptors <= before.descriptors + 2
    assert totals.kinds == {"whole", "stream", "leave", "cancel"}
    assert totals.compared > 30
    assert totals.left > 5
