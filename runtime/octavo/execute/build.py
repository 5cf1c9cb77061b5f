"""From settings to a running core: picks device and dtype, loads the weights, sizes the KV cache. Runs on the engine's
thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from octavo_kernels.cpu.compiler import available as cpu_kernels_available

from octavo.attention.base import AttentionBackend
from octavo.attention.cpu import KV_PAD, CpuAttention
from octavo.attention.triton import TritonAttention
from octavo.config import EngineConfig
from octavo.engine.blocks import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import Scheduler
from octavo.errors import ConfigError
from octavo.execute.context import KVCache
from octavo.execute.runner import Model, Runner
from octavo.execute.table import RowTable
from octavo.models.cache import cache_dir
from octavo.models.config import ModelConfig
from octavo.models.llama_packed import CACHE_BLOCK, PackedLlama, ProgramAttention
from octavo.models.llama_packed import supports as packed_supports
from octavo.models.loader import load_model
from octavo.models.sources import ModelFiles
from octavo.models.weights import GGUFWeights

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
    packed: bool = False
    """The weights stay in the bits of their GGUF file, and steps run as programs of CPU kernels."""


def build_core(
    config: EngineConfig, files: ModelFiles, model_config: ModelConfig, resolved: Resolved,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> EngineCore:  # fmt: skip
    """Load the model and put an engine around it."""
    kv = _kv_cache(model_config, resolved)
    model: Model
    attention: AttentionBackend
    if resolved.packed:
        with GGUFWeights(files.path, model_config) as reader, torch.inference_mode():
            model = PackedLlama(
                model_config, reader, kv, max_len=resolved.max_model_len, max_tokens=resolved.max_num_batched_tokens,
                cache=cache_dir() / "kernels", progress=progress,
            )  # fmt: skip
        attention = ProgramAttention()
    else:
        model = load_model(
            files, model_config, load_format=config.load_format, max_len=resolved.max_model_len, dtype=resolved.dtype,
            device=resolved.device, progress=progress,
        )  # fmt: skip
        attention = attention_for(resolved.device, resolved.dtype)
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
    return EngineCore(scheduler, Runner(model, kv, table, attention), depth=resolved.depth)


def attention_for(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    return TritonAttention() if device.type == "cuda" else CpuAttention(dtype)


def stays_packed(config: EngineConfig, files: ModelFiles, model: ModelConfig, device: torch.device) -> bool:
    """The weights stay in the bits of their file. Raises `ConfigError` where that was asked for and cannot be."""
    if config.quantization is None:
        return False

    def refuse(why: str, field: str = "quantization") -> ConfigError:
        return ConfigError(f"quantization='gguf' {why}", field)

    if files.format != "gguf":
        raise refuse("needs a GGUF file: leave it out for other models")
    if device.type != "cpu" or not cpu_kernels_available():
        raise refuse("needs a CPU with AVX512-VNNI and AVX512-BF16, on Linux: leave it out on other machines")
    if not packed_supports(model):
        raise refuse("needs sizes in multiples of 32 and no biases but those of QKV: leave it out for this model")
    if config.load_format != "auto":
        raise refuse(f"reads the file's weights, not load_format={config.load_format!r}: leave that out", "load_format")
    if config.dtype not in ("auto", "bfloat16"):
        raise refuse(f"keeps its cache in bfloat16, not {config.dtype}: leave dtype out", "dtype")
    if config.block_size not in (None, CACHE_BLOCK):
        raise refuse(f"has blocks of {CACHE_BLOCK} tokens, not {config.block_size}: leave block_size out", "block_size")
    return True


def resolve_settings(config: EngineConfig, files: ModelFiles, model: ModelConfig) -> Resolved:
    """Decide everything that is left to the machine. Raises `ConfigError` for what it cannot do."""
    device = _device(config)
    packed = stays_packed(config, files, model, device)
    dtype = torch.bfloat16 if packed else _dtype(config, model, device)
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
    item = torch.empty(0, dtype=dtype).element_size()
    block_bytes = 2 * model.num_layers * model.num_kv_heads * block_size * model.head_dim * item
    num_blocks = _num_blocks(config, model, device, item, block_bytes, block_size, max_num_seqs)
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
        device, dtype, block_size, num_blocks, max_len, max_num_seqs, max_batched, 1 if gpu else 0, packed
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
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def free_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device, of the RAM for the CPU. A container's limit counts as the total."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            total = min(total, int(limit))
            free = max(min(free, int(limit) - used), 0)
    except (OSError, ValueError):
        pass  # no such files here: the figures of sysconf stand
    return free, total


def _num_blocks(
    config: EngineConfig,
    model: ModelConfig,
    device: torch.device,
    item: int,
    block_bytes: int,
    block_size: int,
    seqs: int,
) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    free, total = free_memory(device)
    weights = weight_count(model) * item
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


def weight_count(model: ModelConfig) -> int:
    """Parameters of the model (its matrices)."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    mlp = 3 * model.hidden_size * model.intermediate_size
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return model.num_layers * (attention + mlp) + embeddings


def _kv_cache(model: ModelConfig, resolved: Resolved) -> KVCache:
    shape = (resolved.num_blocks, model.num_kv_heads, resolved.block_size, model.head_dim)

    def layer() -> torch.Tensor:
        if resolved.device.type == "cuda":
            return torch.zeros(shape, dtype=resolved.dtype, device=resolved.device)
        # calloc: the system gives zeroed pages when they are first touched, so an unused cache costs nothing
        item = torch.empty(0, dtype=resolved.dtype).element_size()
        return torch.from_numpy(np.zeros(int(np.prod(shape)) * item, dtype=np.uint8)).view(resolved.dtype).view(shape)

    count = model.num_layers
    return KVCache([layer() for _ in range(count)], [layer() for _ in range(count)])
