"""What the machine of an engine can do, measured, and what its model asks of it. For the limits beside the figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from octavo.bench.limits import Machine, ModelWork, Part, least_seconds, step_need
from octavo.bench.workloads import Job
from octavo.errors import ConfigError
from octavo.host import usable_cores
from octavo.host_memory import zero_pages
from octavo.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from octavo.engine.service import EngineService
    from octavo.engine.start import Engine


@dataclass(frozen=True, slots=True)
class Limit:
    """The machine, the model, and how many requests run at once."""

    machine: Machine
    model: ModelWork
    at_once: int

    def seconds(self, job: Job) -> float:
        """The least that a job can take."""
        return least_seconds(self.model, self.machine, job, self.at_once)

    def best(self, other: Limit) -> Limit:
        """Of two measurements of the same engine: what the machine showed in either."""
        mine, its = self.machine, other.machine
        machine = Machine(max(mine.bandwidth, its.bandwidth), max(mine.products, its.products))
        return Limit(machine, self.model, self.at_once)

    def rate(self, rows: int) -> float:
        """Tokens a second that steps of so many rows can make at most, where attention costs nothing."""
        return rows / step_need(self.model, [Part(0, 1)] * rows).seconds(self.machine)


def limit_of(engine: Engine) -> Limit:
    """Measures the machine, which takes a second and wants nothing else to run."""
    import torch

    limits = engine.limits
    on, kind = torch.device(limits.device), torch.int8 if limits.packed else getattr(torch, limits.dtype)
    machine = Machine(measure_bandwidth(on), measure_products(on, kind))
    shape = engine.model_config
    if not isinstance(shape, ModelConfig):
        raise ConfigError(f"{engine.config.model} is an encoder-decoder: its limits are not known yet", "model")
    work = model_work(shape, limits.weight_bytes, _cache_item(engine))
    return Limit(machine, work, limits.max_num_seqs)


def model_work(config: ModelConfig, weight_bytes: int, cache_item: int) -> ModelWork:
    """`weight_bytes` of all matrices, `cache_item` of a number in the KV cache. Where embedding and head are two, a
    step reads a few lines of the embedding only; it is left out in proportion to its parameters."""
    from octavo.execute.packing import weight_count

    table, all_parameters = config.vocab_size * config.hidden_size, weight_count(config)
    layers = all_parameters - table * (1 if config.tie_word_embeddings else 2)
    return ModelWork(
        weight_bytes=weight_bytes * (layers + table) / all_parameters,
        layer_parameters=layers,
        head_parameters=table,
        kv_bytes=2 * config.num_kv_heads * config.head_dim * cache_item,
        pair_operations=4 * config.num_heads * config.head_dim,
        windows=config.layer_windows or (0,) * config.num_layers,
    )


def _cache_item(engine: Engine) -> int:
    """Bytes of a number in the cache, as it is, whatever type it has."""
    return int(in_process(engine).call(lambda core: cast(Any, core.runner).kv.layers[0].keys.element_size()))


def in_process(engine: Engine) -> EngineService:
    """The service of an engine that was started in this process."""
    return cast("EngineService", engine.service)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that all cores read together from memory: the best of several passes over 512 MiB."""
    import torch
    from octavo_kernels.cpu.compiler import available

    if device.type == "cpu" and available():
        from octavo_kernels.cpu.bandwidth import read_bandwidth

        memory = zero_pages(1 << 29, large=True)
        return read_bandwidth(memory.fill_(1), min(torch.get_num_threads(), usable_cores()))
    data = torch.ones(1 << 27, dtype=torch.float32, device=device)
    return float(data.numel() * 4 / _best(data.sum, device))


def measure_products(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in one large product."""
    import torch

    side = 8192 if device.type == "cuda" else 2048
    a = torch.ones(side, side, dtype=dtype, device=device)
    b = torch.ones(side, side, dtype=dtype, device=device)
    multiply = cast(Any, torch._int_mm if dtype == torch.int8 else torch.matmul)
    return float(2 * side**3 / _best(lambda: multiply(a, b), device))


def _best(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call. On a GPU of 8 in a row: while one runs the next is launched, which takes the host tens of
    microseconds, where reading 512 MiB takes an H100 180."""
    import torch

    gpu, seconds = device.type == "cuda", []
    calls = 8 if gpu else 1
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(calls):
            function()
        if gpu:
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - began) / calls)
    return min(seconds)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process held at once, of the device's memory on a GPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None  # not on this system
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
