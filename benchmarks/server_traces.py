"""Does a server give every request the tokens of its solo run, and hold nothing afterwards, whatever clients do? Random
timed traces over HTTP on a tiny model: `python benchmarks/server_traces.py --count 10000`. Stops with the seed of the
first trace that is wrong.

Several traces run at once. Prints a table; the traces are those of `tests/server/http_traces.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "runtime"), str(TESTS / "server")]
BETWEEN_LOOKS = 100
"""Traces after which nothing may be held."""


async def run(bench: Any, totals: Any, seeds: range, at_once: int) -> None:
    waiting = iter(seeds)

    async def worker() -> None:
        for seed in waiting:
            await bench.trace(seed, totals)

    await asyncio.gather(*(worker() for _ in range(at_once)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="traces")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trace")
    parser.add_argument("--at-once", type=int, default=4, help="traces that run at the same time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more traces after so long")
    options = parser.parse_args()

    import psutil
    from http_traces import Bench, Totals
    from serving_helpers import program
    from test_http_traces import OPTIONS
    from tiny_models import make_model

    totals, began = Totals(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = make_model("llama-head-dim", Path(folder))
        with program("--model", str(path), *OPTIONS) as running:
            parent = psutil.Process(running.process.pid)
            bench = Bench(running.url, "tiny", [parent, *parent.children(recursive=True)], vocabulary=300)
            asyncio.run(run(bench, totals, range(options.seed, options.seed + 4), 1))
            before, memory = bench.held(), _memory(bench.processes)
            for first in range(options.seed, options.seed + options.count, BETWEEN_LOOKS):
                if time.monotonic() - began > options.minutes * 60:
                    break
                seeds = range(first, min(first + BETWEEN_LOOKS, options.seed + options.count))
                asyncio.run(run(bench, totals, seeds, options.at_once))
                held = bench.held()
                print(f"{totals.traces} traces, {time.monotonic() - began:.0f} s, {held}", file=sys.stderr)
            after = bench.held()
            grown = _memory(bench.processes) - memory
    counts = {name: value for name, value in asdict(totals).items() if isinstance(value, int)}
    print("".join(f"{name:>14}" for name in [*counts, "seconds", "MB more"]))
    print("".join(f"{value:>14}" for value in [*counts.values(), round(time.monotonic() - began), round(grown / 1e6)]))
    print(f"before: {before}, afterwards: {after}")
    print("every request that was answered whole equals its solo run")
    return 0


def _memory(processes: list[Any]) -> int:
    return sum(process.memory_info().rss for process in processes)


if __name__ == "__main__":
    sys.exit(main())
