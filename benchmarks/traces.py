"""Does every request get the tokens of its solo run, whatever else runs, however small the KV cache? Random traces on a
tiny model: `python benchmarks/traces.py --count 10000`. Stops with the seed of the first trace that is wrong.

Prints a table and writes JSON (`--json`). The traces are those of `tests/runtime/test_traces.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "runtime"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="traces, half of them in each type")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trace")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="default: both")
    parser.add_argument("--json", type=Path, help="write the totals here")
    options = parser.parse_args()

    import torch
    from tiny_models import make_model
    from trace_cases import Bench, Totals

    dtypes = options.dtype or ["float32", "bfloat16"]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_model("llama-head-dim", Path(folder))
        for dtype in dtypes:
            bench, totals, began = Bench(path, getattr(torch, dtype)), Totals(), time.monotonic()
            for seed in range(options.seed, options.seed + options.count // len(dtypes)):
                bench.trace(seed, totals)
                if totals.traces % 500 == 0:
                    print(f"{dtype}: {totals.traces} traces, {time.monotonic() - began:.0f} s", file=sys.stderr)
            bench.close()
            results[dtype] = asdict(totals) | {"seen": sorted(totals.seen), "seconds": time.monotonic() - began}
    names = ["traces", "requests", "aborted", "preemptions", "cached_tokens", "failures", "steps", "tokens", "seconds"]
    print("".join(f"{name:>14}" for name in ["dtype", *names]))
    for dtype, totals in results.items():
        print(f"{dtype:>14}" + "".join(f"{totals[name]:>14.0f}" for name in names))
    print("every request equals its solo run")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
