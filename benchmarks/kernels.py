"""How close to the hardware's limit does each kernel come?

Times every operator of `octavo_kernels` on the GPU at shapes of a 0.6 B, an 8 B and a 70 B model, in prefill and in
decode, and prints beside each time the bytes it must move (or the products it must do) and the least time the chip
needs for them. Writes the same as JSON with `--json FILE`. Needs a CUDA device.

    python benchmarks/kernels.py [--only attention] [--json kernels.json]

Times are medians of CUDA graph replays, so that the host's launch cost, which a captured decode step does not pay, is
left out. Between replays nothing is flushed: buffers of a few MB stay in the L2 cache, as they do in a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from octavo_kernels import (
    fused_add_rms_norm,
    gumbel_sample,
    paged_attention,
    rope_and_cache,
    silu_and_mul,
    step_inputs,
    top_k_top_p_min_p,
)

# name in the device's properties -> (memory TB/s, dense bf16 TFLOP/s), from the vendor's data sheets
CHIPS = {
    "H200": (4.8, 989.0), "H100 PCIe": (2.0, 756.0), "H100": (3.35, 989.0), "B200": (8.0, 2250.0),
    "A100-SXM4-80GB": (2.04, 312.0), "A100": (1.55, 312.0), "L40S": (0.864, 362.0), "4090": (1.01, 165.0),
}  # fmt: skip
MODELS = {"0.6B": (16, 8, 128, 1024, 3072), "8B": (32, 8, 128, 4096, 14336), "70B": (64, 8, 128, 8192, 28672)}


@dataclass
class Row:
    kernel: str
    shape: str
    microseconds: float
    megabytes: float
    gigaflop: float
    limit_microseconds: float

    @property
    def share(self) -> float:
        return self.limit_microseconds / self.microseconds


def time_graph(run: Callable[[], object], repeats: int = 7) -> float:
    """Median microseconds of one call, from graphs of as many calls as take about a millisecond."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    calls = 1
    while True:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        total = statistics.median(times)
        if total > 1000 or calls >= 256:
            return total / calls
        calls *= 4


class Bench:
    def __init__(self, only: str) -> None:
        self.device, self.rows, self.only = torch.device("cuda"), list[Row](), only
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        known = next((value for key, value in CHIPS.items() if key in self.name), None)
        self.bandwidth, self.tflops = known if known else (float("nan"), float("nan"))

    def add(self, kernel: str, shape: str, run: Callable[[], object], size: float, flop: float = 0.0) -> None:
        if self.only not in kernel:
            return
        limit = max(size / self.bandwidth / 1e6, flop / self.tflops / 1e6)
        row = Row(kernel, shape, time_graph(run), size / 1e6, flop / 1e9, limit)
        self.rows.append(row)
        work = f"{row.megabytes:9.2f} MB {row.gigaflop:9.1f} GF limit {row.limit_microseconds:8.1f} us"
        print(f"{row.kernel:20} {row.shape:44} {row.microseconds:9.1f} us {work} {row.share:6.1%}", flush=True)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def ints(self, values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def attention(self) -> None:
        cases = {
            "decode B=1 ctx=2048": [(1, 2048)], "decode B=1 ctx=32768": [(1, 32768)],
            "decode B=64 ctx=2048": [(1, 2048)] * 64, "decode B=256 ctx=1024": [(1, 1024)] * 256,
            "decode B=32 mixed ctx 64..8192": [(1, 64 + 262 * i) for i in range(32)],
            "speculate n=5 B=16 ctx=4096": [(5, 4096)] * 16,
            "prefill 1x2048": [(2048, 2048)], "prefill 1x8192": [(8192, 8192)],
            "chunk 512 on ctx=8192": [(512, 8192)], "prefill 1024 + 63 decode": [(1024, 1024)] + [(1, 2048)] * 63,
        }  # fmt: skip
        for model, (heads, kv_heads, size, _, _) in MODELS.items():
            if model == "70B":
                continue
            for label, sequences in cases.items():
                counts, lengths = [c for c, _ in sequences], [n for _, n in sequences]
                needed = [-(-n // 16) for n in lengths]
                cache = self.random(2, sum(needed), kv_heads, 16, size)
                table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
                order, used = torch.randperm(sum(needed), dtype=torch.int32), 0
                for b, n in enumerate(needed):
                    table[b, :n] = order[used : used + n]
                    used += n
                starts = self.ints([0, *counts]).cumsum(0).to(torch.int32)
                q, table, ends = self.random(sum(counts), heads, size), table.to(self.device), self.ints(lengths)
                out = torch.empty_like(q)

                run = partial(
                    paged_attention, q, block_table=table, query_start=starts, seq_lens=ends, max_query_len=max(counts),
                    max_seq_len=max(lengths), scale=size**-0.5, out=out,
                )  # fmt: skip

                pairs = sum(c * (n - c) + c * (c + 1) // 2 for c, n in sequences)
                size_kv, flop = 2 * 2 * kv_heads * size * sum(lengths), 4 * pairs * heads * size
                self.add("paged_attention", f"{model} {label}", partial(run, *cache), size_kv + 4 * q.numel(), flop)
                if torch.cuda.get_device_capability(self.device) >= (8, 9):
                    eight = partial(run, *cache.to(torch.float8_e4m3fn), kv_scales=torch.ones(2, kv_heads).to(q.device))
                    self.add("paged_attention FP8", f"{model} {label}", eight, size_kv / 2 + 4 * q.numel(), flop)

    def layers(self) -> None:
        for model, (heads, kv_heads, size, hidden, inner) in MODELS.items():
            for tokens in (1, 64, 8192):
                shape = f"{model} T={tokens}"
                x, residual, weight = self.random(tokens, hidden), self.random(tokens, hidden), self.random(hidden)
                out = torch.empty_like(x)
                self.add("fused_add_rms_norm", shape, lambda a=(x, residual, weight, 1e-6, out): fused_add_rms_norm(*a),
                         8 * x.numel())  # fmt: skip
                gated = self.random(tokens, 2 * inner)
                half = torch.empty(tokens, inner, dtype=gated.dtype, device=self.device)
                self.add("silu_and_mul", shape, lambda a=(gated, half): silu_and_mul(*a), 6 * half.numel())
                qkv = self.random(tokens, (heads + 2 * kv_heads) * size)
                cache = self.random(2, tokens // 16 + 1, kv_heads, 16, size)
                slots = torch.arange(tokens, device=self.device)
                angles, norm = self.random(tokens, size, dtype=torch.float32), self.random(size)
                q = torch.empty(tokens, heads, size, dtype=qkv.dtype, device=self.device)
                arguments = (qkv, angles, slots, slots, cache[0], cache[1], heads, kv_heads)
                self.add("rope_and_cache", shape,
                         lambda a=arguments, n=norm, q=q: rope_and_cache(*a, q_norm=n, k_norm=n, out=q),
                         4 * qkv.numel() + 4 * angles.numel())  # fmt: skip
        tokens_table = torch.zeros(256, 32768, dtype=torch.int32, device=self.device)
        blocks = torch.zeros(256, 2048, dtype=torch.int32, device=self.device)
        for batch in (1, 256):
            rows, starts = torch.arange(batch, dtype=torch.int32, device=self.device), self.ints([1000] * batch)
            bounds = torch.arange(batch + 1, dtype=torch.int32, device=self.device)
            arguments = (rows, starts, bounds, tokens_table, blocks, 16)
            self.add("step_inputs", f"B={batch}", lambda a=arguments, n=batch: step_inputs(*a, total=n), 40 * batch)

    def sampling(self) -> None:
        for batch in (1, 64, 256):
            for vocab in (32000, 151936):
                # a few likely tokens over a broad floor, about as models have it: top-p 0.9 keeps some dozens
                logits, shape = self.random(batch, vocab, dtype=torch.float32) * 2, f"B={batch} V={vocab}"
                logits[:, :100] += torch.linspace(14, 4, 100, device=self.device)
                seeds = torch.arange(batch, device=self.device)
                ones, zeros = torch.ones(batch, device=self.device), torch.zeros(batch, device=self.device)
                off = torch.zeros(batch, dtype=torch.int32, device=self.device)
                for label, heat in (("greedy", zeros), ("T=1", ones)):
                    self.add("gumbel_sample", f"{shape} {label}",
                             lambda a=(logits, heat, seeds, seeds): gumbel_sample(*a), 4 * logits.numel())  # fmt: skip
                # The filter works in place; what it kept once it keeps again, so that each call starts from a copy.
                work = torch.empty_like(logits)
                for label, k, p in (("copy only", None, 1.0), ("top-k 50", 50, 1.0), ("top-p 0.9", 0, 0.9),
                                    ("top-k 50, top-p 0.9", 50, 0.9)):  # fmt: skip

                    settings = None if k is None else (ones, off + k, ones * p, zeros)
                    run = partial(copy_and_filter, logits, work, settings)
                    self.add("top_k_top_p_min_p", f"{shape} {label}", run, 16 * logits.numel())


def copy_and_filter(logits: torch.Tensor, work: torch.Tensor, settings: tuple[torch.Tensor, ...] | None) -> None:
    work.copy_(logits)
    if settings is not None:
        top_k_top_p_min_p(work, *settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: the kernels cannot be timed", file=sys.stderr)
        return 1
    bench = Bench(options.only)
    print(f"{bench.name}, torch {torch.__version__}: {bench.bandwidth} TB/s, {bench.tflops} TFLOP/s in bf16")
    for part in (bench.layers, bench.sampling, bench.attention):
        part()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({
                "device": bench.name, "torch": torch.__version__, "terabytes_per_second": bench.bandwidth,
                "rows": [{**asdict(row), "share_of_limit": row.share} for row in bench.rows],
            }, file, indent=1)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
