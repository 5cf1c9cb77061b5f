"""From settings to a running core: picks device and dtype, loads the weights, sizes the KV cache. Runs on the engine's
thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from octavo_kernels.cpu.compiler import keep_objects_in
from octavo_kernels.cpu.processor import cpu_flags

from octavo.attention.base import AttentionBackend
from octavo.attention.cpu import KV_PAD, CpuAttention
from octavo.attention.triton import TritonAttention, plan_long_prompts
from octavo.config import EngineConfig
from octavo.engine.blocks import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import Scheduler
from octavo.engine.turns import PROCESS_CORES, Turn
from octavo.errors import ConfigError
from octavo.execute.context import KVCache
from octavo.execute.fp8_cache import calibrated_scales, choose_cache_dtype
from octavo.execute.graphed_runner import GraphedRunner
from octavo.execute.graphs import CudaRecorder, StepGraphs
from octavo.execute.model import Model
from octavo.execute.packing import choose_packing, held_weights
from octavo.execute.runner import Runner
from octavo.execute.table import RowTable
from octavo.host import free_memory, usable_cores
from octavo.host_memory import zero_pages
from octavo.models.cache import cache_dir
from octavo.models.config import ModelConfig
from octavo.models.llama_packed import PackedLlama, ProgramAttention
from octavo.models.loader import load_model
from octavo.models.packed_weights import RECIPES, Packing, load_packed, noise_recipe
from octavo.models.sources import ModelFiles
from octavo.models.weights import open_dummy, open_weights

TOKENS_PER_SEQUENCE = 1024
"""The default KV cache holds so many tokens for each of `max_num_seqs` sequences."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What "auto" became on this machine."""

    device: torch.device
    dtype: torch.dtype
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    depth: int
    packing: Packing | None = None
    """How weights are packed, where steps run as programs of CPU kernels."""
    cache_dtype: torch.dtype | None = None
    """Type of the KV cache, where it is not `dtype`."""


def build_core(
    config: EngineConfig, files: ModelFiles, model_config: ModelConfig, resolved: Resolved,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> EngineCore:  # fmt: skip
    """Load the model and put an engine around it."""
    threads = limit_torch_threads()
    keep_objects_in(cache_dir() / "kernels")
    kv = _kv_cache(model_config, resolved)
    model: Model
    attention: AttentionBackend
    turns: AbstractContextManager[None] = nullcontext()
    if resolved.packing is not None:
        dummy = config.load_format == "dummy"
        with open_dummy() if dummy else open_weights(files, model_config) as reader:
            recipe = noise_recipe(resolved.packing) if dummy else RECIPES[resolved.packing](reader)
            weights = load_packed(reader, model_config, recipe, progress)
        with torch.inference_mode():
            model = PackedLlama(
                model_config, weights, kv, max_len=resolved.max_model_len, max_tokens=resolved.max_num_batched_tokens,
                threads=threads, cache=cache_dir() / "kernels",
            )  # fmt: skip
        attention = ProgramAttention()
        turns = Turn(PROCESS_CORES, threads)
    else:
        model = load_model(
            files, model_config, load_format=config.load_format, max_len=resolved.max_model_len, dtype=resolved.dtype,
            device=resolved.device, progress=progress,
        )  # fmt: skip
        attention = attention_for(resolved.device, resolved.dtype, model_config, resolved.max_num_batched_tokens)
    pool = BlockPool(resolved.num_blocks, resolved.block_size, caching=config.enable_prefix_caching)
    scheduler = Scheduler(
        pool,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        clock=time.monotonic,
    )
    table = RowTable(
        resolved.max_num_seqs, resolved.max_model_len, resolved.block_size, model_config.vocab_size, resolved.device
    )
    if resolved.device.type != "cuda":
        runner = Runner(model, kv, table, attention)
    else:
        recorder = CudaRecorder()
        if resolved.cache_dtype is not None:
            kv.scales = calibrated_scales(
                model, model_config, recorder, dtype=resolved.dtype, device=resolved.device,
                max_tokens=min(resolved.max_model_len, resolved.max_num_batched_tokens),
            )  # fmt: skip
        graphs = StepGraphs(
            model, kv, table, attention, max_tokens=resolved.max_num_batched_tokens,
            hidden=model_config.hidden_size, dtype=resolved.dtype, recorder=recorder,
        )  # fmt: skip
        graphs.capture()
        runner = GraphedRunner(model, kv, table, attention, graphs)
    return EngineCore(scheduler, runner, depth=resolved.depth, turns=turns)


def attention_for(
    device: torch.device, dtype: torch.dtype, model: ModelConfig | None = None, max_tokens: int = 0
) -> AttentionBackend:
    """With a `model` and the longest step: ready to run, as far as a library takes part in it."""
    if device.type != "cuda":
        return CpuAttention(dtype)
    library = model is not None and plan_long_prompts(
        device, dtype, model.num_heads, model.num_kv_heads, model.head_dim, max_tokens
    )
    return TritonAttention(library=library)


def resolve_settings(config: EngineConfig, files: ModelFiles, model: ModelConfig) -> Resolved:
    """Decide everything that is left to the machine. Raises `ConfigError` for what it cannot do."""
    device = _device(config)
    cache_dtype = choose_cache_dtype(config, device)
    packing = choose_packing(config, files, model, device)
    dtype = torch.bfloat16 if packing else _dtype(config, model, device)
    gpu = device.type == "cuda"
    block_size = config.block_size or attention_for(device, dtype).default_block_size
    if not gpu and (block_size > KV_PAD or KV_PAD % block_size):
        raise ConfigError(f"block_size must divide {KV_PAD} on the CPU, not {block_size}", "block_size")
    max_num_seqs = config.max_num_seqs or (256 if gpu else 64)
    max_batched = config.max_num_batched_tokens or (8192 if gpu else 512)
    if max_batched < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={max_batched} is less than max_num_seqs={max_num_seqs}: every running sequence "
            "needs a token of the budget", "max_num_batched_tokens",
        )  # fmt: skip
    item = (cache_dtype or dtype).itemsize
    block_bytes = 2 * model.num_layers * model.num_kv_heads * block_size * model.head_dim * item
    weights = held_weights(model, packing, dtype).bytes
    num_blocks = _num_blocks(config, model, device, weights, block_bytes, block_size, max_num_seqs)
    capacity = (num_blocks - 1) * block_size
    max_len = config.max_model_len or min(model.max_position, capacity)
    if max_len > model.max_position:
        raise ConfigError(
            f"max_model_len={max_len} exceeds the {model.max_position} positions that the model was made for",
            "max_model_len",
        )
    if max_len > capacity:
        raise ConfigError(
            f"max_model_len={max_len} does not fit into a KV cache of {capacity} tokens: lower it, or raise "
            "num_blocks, kv_cache_memory or gpu_memory_utilization", "max_model_len",
        )  # fmt: skip
    return Resolved(
        device, dtype, block_size, num_blocks, max_len, max_num_seqs, max_batched, 1 if gpu else 0, packing, cache_dtype
    )


def _device(config: EngineConfig) -> torch.device:
    if config.device != "auto":
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError("device='cuda' was asked for, but torch sees no GPU: use device='cpu'", "device")
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    if device.type == "cuda":
        return torch.float16 if model.dtype == "float16" else torch.bfloat16
    # without native bfloat16 products the CPU would emulate them, slower than float32
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """AVX512-BF16 or AMX on x86, BF16 on ARM."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def limit_torch_threads() -> int:
    """How many threads an engine on the CPU has, here and in torch: as many as torch, but no more than may run at once.
    A container's quota is lower than the number of cores that torch counts; who set a lower number meant it.

    Called on the engine's thread: torch keeps the number for each thread, and a new thread takes what was set last."""
    threads = min(torch.get_num_threads(), usable_cores())
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads


def _memory_of(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device, of the RAM for the CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    return free_memory()


def _num_blocks(
    config: EngineConfig,
    model: ModelConfig,
    device: torch.device,
    weights: int,
    block_bytes: int,
    block_size: int,
    seqs: int,
) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    free, total = _memory_of(device)
    if config.kv_cache_memory is not None:
        room, field = config.kv_cache_memory, "kv_cache_memory"
    elif config.gpu_memory_utilization is not None:
        room, field = int(total * config.gpu_memory_utilization) - weights - (total - free), "gpu_memory_utilization"
    else:
        wanted = (
            max(seqs * TOKENS_PER_SEQUENCE, min(config.max_model_len or model.max_position, 32768)) + 2 * block_size
        )
        room, field = min(wanted // block_size * block_bytes, (free - weights) // 2), "model"
    blocks = room // block_bytes
    if blocks < 2:
        raise ConfigError(
            f"no room for a KV cache: a block takes {block_bytes / 2**20:.1f} MiB, the weights "
            f"{weights / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB of {total / 2**30:.2f} GiB are free", field,
        )  # fmt: skip
    return int(blocks)


def _kv_cache(model: ModelConfig, resolved: Resolved) -> KVCache:
    layers, blocks = model.num_layers, resolved.num_blocks
    block = (model.num_kv_heads, resolved.block_size, model.head_dim)
    if resolved.device.type == "cuda":
        dtype = resolved.cache_dtype or resolved.dtype
        made = [torch.zeros(blocks, *block, dtype=dtype, device=resolved.device) for _ in range(2 * layers)]
        return KVCache(made[::2], made[1::2])
    item = torch.empty(0, dtype=resolved.dtype).element_size()
    size = 2 * layers * blocks * math.prod(block) * item
    if resolved.packing is None:
        made = list(zero_pages(size, large=False).view(resolved.dtype).view(2 * layers, blocks, *block))
        return KVCache(made[::2], made[1::2])
    # all layers of a block lie together: memory is taken block by block, as they are first used, also in large pages
    whole = zero_pages(size, large=True).view(resolved.dtype).view(blocks, layers, 2, *block)
    return KVCache([whole[:, n, 0] for n in range(layers)], [whole[:, n, 1] for n in range(layers)])
