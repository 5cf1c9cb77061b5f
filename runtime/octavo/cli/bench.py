"""`octavo bench`: how fast a model runs on this machine, beside what the machine could do. Takes about a minute.

A step reads every weight once and multiplies the tokens of all its rows with it. So tokens per second cannot exceed
rows / max(bytes of weights / bandwidth, operations of a token * rows / rate of products); both are measured here, by
reading a large array and by a large product, on the device and in the type that the engine uses.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.options import (
    DEFAULT,
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    Quantization,
    Revision,
    UsageProblem,
    open_llm,
    sampling,
)
from octavo.cli.screen import console, size
from octavo.host import usable_cores
from octavo.host_memory import zero_pages

if TYPE_CHECKING:
    import torch

    from octavo.llm import LLM


@dataclass(frozen=True, slots=True)
class Report:
    """What `--json` prints; seconds, bytes, tokens per second."""

    model: str
    device: str
    weights: str
    threads: int
    seconds_to_ready: float
    prompt_tokens: int
    output_tokens: int
    requests: int
    time_to_first_token: float
    """Median over a few prompts, on an idle engine, nothing cached."""
    single_tokens_per_second: float
    batched_tokens_per_second: float
    """Output tokens of all requests over the whole time, prefill included."""
    single_limit: float
    batched_limit: float
    """What bandwidth and products would allow for the decoding alone."""
    bandwidth: float
    products_per_second: float
    """Operations, a multiplication and an addition being two."""
    weight_bytes: int
    memory_bytes: int | None
    """Peak resident memory of this process; of the device on a GPU."""


def bench(
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at once in the batched run.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens in each answer.")] = 64,
    as_json: Json = False,
    model: Model = DEFAULT,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    debug: Debug = False,
) -> None:
    """Measure this machine: time to first token, tokens per second alone and in a batch, memory, and the limit.

    Random prompts, greedy answers of a fixed length, no prefix cache. Close other programs first: on a busy machine it
    measures the others too.
    """
    settings = {"revision": revision, "device": device, "dtype": dtype, "quantization": quantization}
    with open_llm(model, enable_prefix_caching=False, **settings) as llm:
        if prompt_tokens + output_tokens > llm.engine.limits.max_model_len:
            raise UsageProblem(f"prompt and answer exceed the model's {llm.engine.limits.max_model_len} tokens")
        report = measure(llm, model, requests, prompt_tokens, output_tokens)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print(report)


def measure(llm: LLM, model: str, requests: int, prompt_tokens: int, output_tokens: int) -> Report:
    """Run everything on an idle `llm` and return the figures."""
    import torch

    limits = llm.engine.limits
    source = random.Random(0)

    def prompt() -> list[int]:
        return [source.randrange(limits.vocab_size) for _ in range(prompt_tokens)]

    def answer(count: int) -> float | None:
        params = sampling(temperature=0, max_tokens=count, ignore_eos=True)
        metrics = llm.generate(prompt(), params)[0].metrics
        return metrics.first_token_time if count == 1 else metrics.time_per_token

    answer(2)  # the first step of a process is slower: code and caches are cold
    first = statistics.median(answer(1) or 0.0 for _ in range(5))
    step = answer(output_tokens) or float("inf")
    params = sampling(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    prompts = [prompt() for _ in range(requests)]
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
    batched = requests * output_tokens / (time.perf_counter() - began)

    threads = llm.engine.service.call(lambda core: torch.get_num_threads())  # of the engine's thread, not of this one
    on, machine = torch.device(limits.device), machine_limits(llm)
    return Report(
        model, limits.device, limits.weights, threads, llm.engine.seconds_to_ready, prompt_tokens, output_tokens,
        requests, first, 1 / step, batched, machine.rate(1), machine.rate(requests), machine.bandwidth,
        machine.products, machine.weight_bytes,
        torch.cuda.max_memory_allocated(on) if on.type == "cuda" else peak_memory(),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """What a device can do, measured, and what a step asks of it."""

    bandwidth: float
    products: float
    weight_bytes: int
    parameters: int

    def rate(self, rows: int) -> float:
        """Tokens a second that steps of so many rows can make at most."""
        return rows / max(self.weight_bytes / self.bandwidth, 2 * self.parameters * rows / self.products)


def machine_limits(llm: LLM) -> MachineLimits:
    """Measured on the device of `llm`, in the type that its products have: 8-bit integers where weights stay packed."""
    import torch

    from octavo.execute.packing import weight_count

    limits, parameters = llm.engine.limits, weight_count(llm.engine.model_config)
    on, kind = torch.device(limits.device), torch.int8 if limits.packed else getattr(torch, limits.dtype)
    return MachineLimits(measure_bandwidth(on), measure_products(on, kind), limits.weight_bytes, parameters)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that all cores read together from memory: the best of several passes over 512 MiB."""
    import torch
    from octavo_kernels.cpu.compiler import available

    if device.type == "cpu" and available():
        from octavo_kernels.cpu.bandwidth import read_bandwidth

        memory = zero_pages(1 << 29, large=True)
        return read_bandwidth(memory.fill_(1), min(torch.get_num_threads(), usable_cores()))
    data = torch.ones(1 << 27, dtype=torch.float32, device=device)
    return float(data.numel() * 4 / _best(data.sum))


def measure_products(device: object, dtype: object) -> float:
    """Operations a second in one large product."""
    import torch

    side = 8192 if str(device).startswith("cuda") else 2048
    a = torch.ones(side, side, dtype=dtype, device=device)  # type: ignore[call-overload]
    b = torch.ones(side, side, dtype=dtype, device=device)  # type: ignore[call-overload]
    multiply = torch._int_mm if dtype == torch.int8 else torch.matmul
    return float(2 * side**3 / _best(lambda: multiply(a, b)))


def _best(function: Callable[[], object]) -> float:
    import torch

    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def peak_memory() -> int | None:
    """Most bytes of RAM that this process held at once."""
    try:
        import resource
    except ImportError:
        return None  # not on this system
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _print(report: Report) -> None:
    from rich.table import Table

    out = console()
    out.print(
        f"[bold]{report.model}[/bold] on {report.device}, {report.weights}, {report.threads} threads; "
        f"{report.prompt_tokens} tokens in, {report.output_tokens} out\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("measured", "limit", "share"):
        table.add_column(column, justify="right")
    table.add_row("ready after", f"{report.seconds_to_ready:.2f} s")
    table.add_row("time to first token", f"{report.time_to_first_token * 1000:.0f} ms")
    for name, value, limit in (
        ("one request", report.single_tokens_per_second, report.single_limit),
        (f"{report.requests} requests at once", report.batched_tokens_per_second, report.batched_limit),
    ):
        table.add_row(name, f"{value:.1f} tokens/s", f"{limit:.1f}", f"{100 * value / limit:.0f}%")
    if report.memory_bytes:
        table.add_row("memory at most", size(report.memory_bytes))
    out.print(table)
    out.print(
        f"\n[dim]limit: {size(report.weight_bytes)} of weights are read once a step; this machine reads "
        f"{size(report.bandwidth)}/s and multiplies {report.products_per_second / 1e9:.0f} GOP/s (both measured)."
        "[/dim]"
    )
