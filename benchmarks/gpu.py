"""Speed on a GPU, model shapes with random weights: time to ready, one stream, batches, prompts, a shared prefix.

    python benchmarks/gpu.py [--shapes qwen3-0.6b qwen2-1.5b llama3-8b] [--rounds 1] [--out results.json]

The rows, their prompts and what their figures mean stand in `octavo.bench.workloads`; the limit beside each figure in
`octavo.bench.limits`. Every shape runs in a process of its own, so that the time to ready is that of a fresh one, no
kernel compiled before: from constructing the LLM to the return of the constructor. The machine is measured after the
rows, so that it does not disturb them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from octavo.bench.limits import share
from octavo.bench.workloads import NAMES, READY, ROWS

HERE = Path(__file__).parent
LABELS = {READY: "ready, s"} | {name: f"{row.label}, {row.unit}" for name, row in ROWS.items()}


def run(shape: str, settings: dict[str, Any], rows: Iterable[str]) -> dict[str, Any]:
    """All rows on one engine: their figures by name, and under "limits" the best figure that this card allows."""
    from octavo import LLM
    from octavo.bench.machine import limit_of
    from octavo.bench.run import Clock
    from octavo.bench.shapes import with_tokenizer

    with with_tokenizer(HERE / "shapes" / shape) as folder:
        began = time.perf_counter()
        llm = LLM(str(folder), load_format="dummy", **settings)
        found: dict[str, Any] = {READY: time.perf_counter() - began}
    clock = Clock(llm)
    clock.warm_up()
    for name, row in ROWS.items():
        if name in rows:
            try:
                found[name] = clock.value(row)
            except Exception as problem:
                print(f"{name}: {type(problem).__name__}: {problem}", file=sys.stderr)
    found["limits"] = {}
    try:
        limit = limit_of(llm.engine)
    except Exception as problem:  # no room left, say: the figures above still count
        print(f"limits: {type(problem).__name__}: {problem}", file=sys.stderr)
        return found
    for name in ROWS.keys() & found.keys():
        found["limits"][name] = ROWS[name].value(limit.seconds, clock.vocabulary)
    return found


def cell(name: str, runs: list[dict[str, Any]]) -> str:
    """Median, spread, and the median's share of the best limit that a run measured."""
    values = [run[name] for run in runs if name in run]
    if not values:
        return "-"
    text, middle = f"{statistics.median(values):.4g}", statistics.median(values)
    if len(values) > 1:
        text += f" ({min(values):.4g}..{max(values):.4g})"
    limits = [run["limits"][name] for run in runs if name in run["limits"]]
    if limits:
        limit = max(limits) if ROWS[name].unit.endswith("/s") else min(limits)
        text += f" of {limit:.4g}: {share(middle, limit, ROWS[name].unit):.0%}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b", "qwen2-1.5b", "llama3-8b"])
    parser.add_argument("--rows", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--settings", type=json.loads, default={}, help="of the LLM, as JSON")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help="one shape in this process; prints its figures as JSON")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(run(given.shapes[0], given.settings, given.rows)))
        return
    found: dict[str, list[dict[str, Any]]] = {shape: [] for shape in given.shapes}
    for _ in range(given.rounds):
        for shape in given.shapes:
            command = [sys.executable, __file__, "--here", "--shapes", shape, "--rows", *given.rows]
            with tempfile.TemporaryDirectory() as cache:  # of Triton: no run is ready sooner by an earlier one
                done = subprocess.run(
                    [*command, "--settings", json.dumps(given.settings)], stdout=subprocess.PIPE, text=True,
                    check=False, env=os.environ | {"TRITON_CACHE_DIR": cache},
                )  # fmt: skip
            if done.returncode == 0:
                found[shape].append(json.loads(done.stdout.splitlines()[-1]))
                print(shape, {k: round(v, 3) for k, v in found[shape][-1].items() if k in NAMES}, flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1))
    print(f"\n{'median (spread) of limit: share':56}" + "".join(f"{shape:>44}" for shape in found))
    for name, label in LABELS.items():
        print(f"{label:56}" + "".join(f"{cell(name, runs):>44}" for runs in found.values()))


if __name__ == "__main__":
    main()
