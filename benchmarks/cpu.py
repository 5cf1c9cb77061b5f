"""How many output tokens a second, beside transformers on the same machine? Prints a table, writes JSON.

    python benchmarks/cpu.py [--model M] [--requests 64] [--rounds 2] [--out results.json]

Workload: all requests at once, prompts of 16..256 random tokens, outputs of 16..128, greedy, end-of-sequence ignored,
so that both sides make exactly the same number of tokens. transformers runs its best static batching: the best of
several batch sizes, in bfloat16 and float32, requests in order of prompt length (so that padding is small); a batch
runs until its longest output is done, and only the tokens asked for are counted. Octavo runs as it does by itself, and
with `quantization="gguf"` where the model and the machine have it. Each side runs in a process of its
own, one after the other, `rounds` times; the medians are compared. Start-up is measured separately: from process start
to the first token, from the cache.

The physical limit beside the figure: a step reads every weight once and multiplies `rows` tokens with it, so tokens/s
cannot exceed rows / max(bytes / bandwidth, operations / rate), with both measured by `octavo.cli.bench`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def workload(count: int, vocabulary: int = 40000) -> list[tuple[list[int], int]]:
    """(prompt ids, output tokens) of each request; the same in every process."""
    source = random.Random(0)
    return [
        ([source.randrange(100, vocabulary) for _ in range(source.randint(16, 256))], source.randint(16, 128))
        for _ in range(count)
    ]


def run_octavo(model: str, requests: int, dtype: str, quantization: str | None) -> dict[str, Any]:
    began = time.perf_counter()
    from octavo import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, quantization=quantization, enable_prefix_caching=False)
    next(iter(llm.stream([1, 2, 3], SamplingParams(max_tokens=1))))
    ready = time.perf_counter() - began
    work = workload(requests)
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=count) for _, count in work]
    llm.generate([ids for ids, _ in work[:8]], params[:8])
    began = time.perf_counter()
    outputs = llm.generate([ids for ids, _ in work], params)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    began = time.perf_counter()
    llm.generate(work[0][0], SamplingParams(temperature=0, ignore_eos=True, max_tokens=64))
    single = 64 / (time.perf_counter() - began)
    result = {"tokens": tokens, "seconds": seconds, "rate": tokens / seconds, "single": single, "ready": ready}
    from octavo.cli.bench import machine_limits

    machine = machine_limits(llm)
    limits = {"bandwidth": machine.bandwidth, "rate": machine.products}
    limits |= {"single": machine.rate(1), "batched_64": machine.rate(64)}
    result |= {"weights": llm.engine.limits.weights, "limits": limits}
    llm.close()
    return result


def run_transformers(model: str, requests: int, dtype: str, batch: int) -> dict[str, Any]:
    import torch
    from octavo.models.sources import resolve
    from transformers import AutoModelForCausalLM

    files = resolve(model)
    place = (
        {"pretrained_model_name_or_path": str(files.path.parent), "gguf_file": files.path.name}
        if files.format == "gguf"
        else {"pretrained_model_name_or_path": str(files.path)}
    )
    peer = AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype)).eval()
    work = sorted(workload(requests), key=lambda item: len(item[0]))

    def generate(items: list[tuple[list[int], int]]) -> int:
        longest, most = max(len(ids) for ids, _ in items), max(count for _, count in items)
        ids = torch.tensor([[0] * (longest - len(i)) + i for i, _ in items])
        mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i, _ in items])
        with torch.inference_mode():
            peer.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most, min_new_tokens=most,
                pad_token_id=0
            )
        return sum(count for _, count in items)

    generate([(ids[:16], 4) for ids, _ in work[:2]])
    began = time.perf_counter()
    tokens = sum(generate(work[start : start + batch]) for start in range(0, len(work), batch))
    seconds = time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds, "rate": tokens / seconds, "dtype": dtype, "batch": batch}


def in_process(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from octavo.models.sources import DEFAULT_MODEL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=("octavo", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=64, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side == "octavo":
        print(json.dumps(run_octavo(given.model, given.requests, given.dtype, given.quantization)))
        return
    if given.side == "transformers":
        print(json.dumps(run_transformers(given.model, given.requests, given.dtype, given.batch)))
        return

    common = ["--model", given.model, "--requests", str(given.requests)]

    def ours(kind: str | None) -> dict[str, Any]:
        quantization = ["--quantization", kind] if kind else []
        return in_process(["--side", "octavo", *common, "--dtype", given.dtype, *quantization])

    def theirs(dtype: str, batch: int) -> dict[str, Any]:
        return in_process(["--side", "transformers", *common, "--dtype", dtype, "--batch", str(batch)])

    kinds = [None, "gguf"] if keeps_bits(given.model) else [None]
    tried = [theirs(dtype, batch) for dtype in ("bfloat16", "float32") for batch in given.batches]
    best = max(tried, key=lambda run: run["rate"])
    octavo: dict[str | None, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    peer = [best]
    for number in range(given.rounds):
        for kind in kinds:
            octavo[kind].append(ours(kind))
        if number + 1 < given.rounds:
            peer.append(theirs(best["dtype"], best["batch"]))
    peer_rate = statistics.median(run["rate"] for run in peer)
    print(f"\n{given.requests} requests at once, {best['tokens']} output tokens, {given.model}\n")
    for run in tried:
        print(f"transformers {run['dtype']:>9} batch {run['batch']:>3}   {run['rate']:8.1f} tokens/s")
    print(f"transformers best, median          {peer_rate:8.1f} tokens/s")
    report: dict[str, Any] = {"transformers": tried, "peer": peer, "octavo": octavo, "ratio": {}}
    for runs in octavo.values():
        rate, single, ready = (statistics.median(run[name] for run in runs) for name in ("rate", "single", "ready"))
        weights, limits = runs[-1]["weights"], runs[-1]["limits"]
        report["ratio"][weights] = rate / peer_rate
        print(f"\noctavo, {weights}")
        print(f"  all requests, median             {rate:8.1f} tokens/s   limit {limits['batched_64']:6.0f} at 64 rows")
        print(f"  over transformers                {rate / peer_rate:8.2f}")
        print(f"  one request                      {single:8.1f} tokens/s   limit {limits['single']:6.0f}")
        print(f"  start to first token             {ready:8.2f} s")
        print(f"  (read {limits['bandwidth'] / 1e9:.1f} GB/s, products {limits['rate'] / 1e9:.0f} GOP/s)")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=1))


def keeps_bits(model: str) -> bool:
    """`quantization="gguf"` runs with this model on this machine."""
    from octavo.models.sources import resolve
    from octavo_kernels.cpu.compiler import available

    return available() and resolve(model).format == "gguf"


if __name__ == "__main__":
    main()
