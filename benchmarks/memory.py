"""Does `close()` give the memory back? Loads, uses and closes the default model again and again in one process.

    python benchmarks/memory.py [--cycles 24] [--kinds float32 bfloat16 gguf]

Prints the resident memory after each close, MB. The loop is that of `tests/runtime/test_memory.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "runtime"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=24)
    parser.add_argument("--kinds", nargs="+", default=["float32", "bfloat16", "gguf"])
    given = parser.parse_args()

    from octavo.models.sources import DEFAULT_MODEL, resolve
    from test_memory import MEGABYTE, cycles

    for kind in given.kinds:
        found = cycles(str(resolve(DEFAULT_MODEL).path), given.cycles, kind)
        print(f"{kind}: {' '.join(str(size // MEGABYTE) for size in found['closed'])}", flush=True)


if __name__ == "__main__":
    main()
