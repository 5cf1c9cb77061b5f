"""Speed on a GPU, model shapes with random weights: time to ready, one stream, batches, prompts, a shared prefix.

    python benchmarks/gpu.py [--shapes qwen3-0.6b qwen2-1.5b llama3-8b] [--rounds 1] [--out results.json]

Every shape runs in a process of its own, so that the time to ready is that of a fresh one. Prompts are random token
ids, temperature 0.6, end-of-sequence ignored. The rows and their definitions:

    ready              from constructing the LLM to the return of the constructor, no kernel compiled before
    batch              256 requests, prompts and outputs of 100 to 1024 tokens, all at once: output tokens / time
    one_stream         prompt of 128: (time for 257 tokens - time for 1) / 256, median of 3
    first_128, _8000   time of a request for 1 token, nothing else running, prompt never seen: median of 5 and 3
    batch_64           64 prompts of 128 tokens, 128 tokens out: output tokens / time
    prefix             128 prompts that share 2048 tokens, 64 of their own, 64 out; nothing cached: time
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VOCABULARY = 100_000
NAMES = {
    "ready": "ready, s", "one_stream": "one stream, ms per token", "batch": "256 requests, output tokens/s",
    "batch_64": "64 requests 128/128, output tokens/s", "first_128": "first token of 128, ms",
    "first_8000": "first token of 8000, ms", "prefix": "128 sharing 2048, s",
}  # fmt: skip


def ids(source: random.Random, count: int) -> list[int]:
    return [source.randrange(VOCABULARY) for _ in range(count)]


class Bench:
    """All rows on one engine."""

    def __init__(self, shape: str, settings: dict[str, Any]) -> None:
        from octavo import LLM, SamplingParams
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        self._params = SamplingParams
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(HERE / "shapes" / shape / "config.json", folder)
            Tokenizer(WordLevel({"?": 0}, unk_token="?")).save(f"{folder}/tokenizer.json")
            began = time.perf_counter()
            self.llm = LLM(folder, load_format="dummy", **settings)
            self.found: dict[str, Any] = {"ready": time.perf_counter() - began}

    def seconds(self, prompts: list[list[int]], counts: list[int]) -> float:
        params = [
            self._params(temperature=0.6, ignore_eos=True, max_tokens=count, detokenize=False) for count in counts
        ]
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, params)
        seconds = time.perf_counter() - began
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        if made != sum(counts):
            raise RuntimeError(f"{made} tokens made, {sum(counts)} asked for")
        return seconds

    def warm_up(self) -> None:
        self.seconds([ids(random.Random(9), 64)] * 4, [16] * 4)

    def one_stream(self) -> float:
        def once(seed: int, count: int) -> float:
            return self.seconds([ids(random.Random(seed), 128)], [count])

        return statistics.median((once(40 + n, 257) - once(30 + n, 1)) / 256 for n in range(3)) * 1e3

    def first(self, length: int, repeats: int) -> float:
        # a seed of its own for each length: or the longer prompts would begin with the shorter ones, which are cached
        prompts = [ids(random.Random(50000 + length + n), length) for n in range(repeats)]
        return statistics.median(self.seconds([prompt], [1]) for prompt in prompts) * 1e3

    def batch(self, seed: int = 10) -> float:
        source = random.Random(seed)
        prompts = [ids(source, source.randint(100, 1024)) for _ in range(256)]
        counts = [source.randint(100, 1024) for _ in range(256)]
        return sum(counts) / self.seconds(prompts, counts)

    def batch_64(self) -> float:
        def once(seed: int) -> float:
            source = random.Random(seed)
            return 64 * 128 / self.seconds([ids(source, 128) for _ in range(64)], [128] * 64)

        return statistics.median(once(70 + n) for n in range(3))

    def prefix(self) -> float:
        source = random.Random(80)
        common = ids(source, 2048)
        return self.seconds([common + ids(source, 64) for _ in range(128)], [64] * 128)

    def run(self, rows: list[str]) -> dict[str, Any]:
        self.warm_up()
        known: dict[str, Callable[[], float]] = {
            "one_stream": self.one_stream, "first_128": lambda: self.first(128, 5),
            "first_8000": lambda: self.first(8000, 3), "batch_64": self.batch_64, "prefix": self.prefix,
            "batch": self.batch,
        }  # fmt: skip
        for name, function in known.items():
            if name in rows:
                try:
                    self.found[name] = function()
                except Exception as problem:
                    print(f"{name}: {type(problem).__name__}: {problem}", file=sys.stderr)
        return self.found


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
        print(json.dumps(Bench(given.shapes[0], given.settings).run(given.rows)))
        return
    found: dict[str, list[dict[str, float]]] = {shape: [] for shape in given.shapes}
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
                print(shape, {name: round(value, 3) for name, value in found[shape][-1].items()}, flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1))
    print(f"\n{'':40}" + "".join(f"{shape:>24}" for shape in found))
    for name, label in NAMES.items():
        cells = []
        for runs in found.values():
            values = [run[name] for run in runs if name in run]
            spread = f" ({min(values):.4g}..{max(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.4g}{spread}" if values else "-")
        print(f"{label:40}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
