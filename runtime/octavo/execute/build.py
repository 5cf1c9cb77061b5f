"""From settings to a running core: picks device and dtype, loads the weights, makes the KV cache and all around it.
Runs on the engine's thread."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

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
from octavo.execute.graphed_runner import GraphedRunner
from octavo.execute.graphs import CudaRecorder, StepGraphs
from octavo.execute.kv_cache import FP8, cpu_cache, gpu_cache, measure_scales
from octavo.execute.lost import is_lost
from octavo.execute.model import Model
from octavo.execute.packing import choose_packing, held_weights
from octavo.execute.runner import Runner
from octavo.execute.sizing import (
    Card,
    Sizes,
    blocks_in_ram,
    blocks_on_gpu,
    ran_out,
    ran_out_while_starting,
    usable_length,
)
from octavo.execute.table import RowTable
from octavo.host import usable_cores
from octavo.host_memory import give_back_memory
from octavo.layers.linear import ProductMaker, invariant_product, product_with, steady_product
from octavo.models.cache import cache_dir
from octavo.models.config import ModelConfig
from octavo.models.llama_packed import PackedLlama, ProgramAttention
from octavo.models.loader import load_model
from octavo.models.packed_weights import RECIPES, Packing, load_packed, noise_recipe
from octavo.models.seq2seq_config import DecoderConfig
from octavo.models.sources import ModelFiles
from octavo.models.weights import open_dummy, open_weights

FP8_CAPABILITY = (8, 9)
"""Of the first GPUs that convert e4m3 (Ada)."""


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
    sizes: Sizes | None = None
    """On a GPU: by which the cache is sized again when the weights are loaded."""
    fp8_cache: bool = False


Progress = Callable[[str, int, int | None], None]


def build_core(
    config: EngineConfig, files: ModelFiles, model_config: ModelConfig, resolved: Resolved,
    progress: Progress | None = None,
) -> tuple[EngineCore, Resolved]:  # fmt: skip
    """Load the model and put an engine around it. Also returns what the size of the cache became. Raises `ConfigError`
    where the memory of a GPU does not suffice; then nothing of what was made is left."""
    try:
        return _build(config, files, model_config, resolved, progress)
    except RuntimeError as error:
        if resolved.sizes is None or not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what was made so far
    give_back_memory()
    weights = held_weights(model_config, resolved.packing, resolved.dtype).bytes
    raise ran_out_while_starting(config, resolved.sizes, weights, resolved.num_blocks, Card.of(resolved.device))


def _build(
    config: EngineConfig, files: ModelFiles, model_config: ModelConfig, resolved: Resolved, progress: Progress | None
) -> tuple[EngineCore, Resolved]:
    threads = limit_torch_threads()
    keep_objects_in(cache_dir() / "kernels")
    model: Model
    attention: AttentionBackend
    turns: AbstractContextManager[None] = nullcontext()
    if resolved.packing is not None:
        dummy = config.load_format == "dummy"
        with open_dummy() if dummy else open_weights(files, model_config) as reader:
            recipe = noise_recipe(resolved.packing) if dummy else RECIPES[resolved.packing](reader)
            weights = load_packed(reader, model_config, recipe, progress)
        kv = make_kv_cache(model_config, resolved)
        with torch.inference_mode():
            model = PackedLlama(
                model_config, weights, kv, max_len=resolved.max_model_len, max_tokens=resolved.max_num_batched_tokens,
                threads=threads, cache=cache_dir() / "kernels",
            )  # fmt: skip
        attention = ProgramAttention()
        turns = Turn(PROCESS_CORES, threads)
    else:
        before = None if resolved.sizes is None else Card.of(resolved.device)
        model = load_model(
            files, model_config, load_format=config.load_format, max_len=resolved.max_model_len, dtype=resolved.dtype,
            device=resolved.device, progress=progress, product=product_for(resolved.device, config.deterministic),
        )  # fmt: skip
        attention = attention_for(
            resolved.device, resolved.dtype, model_config,
            invariant_to=model_config.max_position + 1 if config.deterministic else 0,  # on every machine the same
        )  # fmt: skip
        if before is not None:
            resolved = _sized_again(config, resolved, before)
        scales = None
        if resolved.fp8_cache:
            scales = measure_scales(
                model, model_config, attention, block_size=resolved.block_size, dtype=resolved.dtype,
                device=resolved.device, max_len=resolved.max_model_len,
            )  # fmt: skip
        kv = make_kv_cache(model_config, resolved, scales)
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
        graphs = StepGraphs(
            model, kv, table, attention, max_tokens=resolved.max_num_batched_tokens,
            hidden=model_config.hidden_size, dtype=resolved.dtype, recorder=CudaRecorder(),
        )  # fmt: skip
        graphs.capture()
        runner = GraphedRunner(model, kv, table, attention, graphs)
    return EngineCore(scheduler, runner, depth=resolved.depth, turns=turns, is_lost=is_lost(resolved.device)), resolved


def make_kv_cache(model: DecoderConfig, resolved: Resolved, scales: list[torch.Tensor] | None = None) -> KVCache:
    """`scales`: of each layer, where it is in FP8."""
    blocks, size, dtype, device = resolved.num_blocks, resolved.block_size, resolved.dtype, resolved.device
    if device.type == "cuda":
        return gpu_cache(model, blocks, size, FP8 if resolved.fp8_cache else dtype, device, scales)
    return cpu_cache(model, blocks, size, dtype, packed=resolved.packing is not None)


def _sized_again(config: EngineConfig, resolved: Resolved, before: Card) -> Resolved:
    """The weights are loaded: blocks for the memory that is now left of what was `before`."""
    assert resolved.sizes is not None
    now = replace(Card.of(resolved.device), context=before.context)
    taken = max(before.free - now.free, 0)
    blocks = blocks_on_gpu(config, resolved.sizes, now, taken, loaded=True)
    length = usable_length(config, resolved.max_model_len, blocks, resolved.block_size)
    return replace(resolved, num_blocks=blocks, max_model_len=length)


def attention_for(
    device: torch.device, dtype: torch.dtype, model: DecoderConfig, invariant_to: int = 0
) -> AttentionBackend:
    """`invariant_to`: when above 0, bits depend on a sequence alone; for lengths up to this. They always do on the CPU.
    """
    if device.type != "cuda":
        return CpuAttention(dtype)
    if invariant_to:
        return TritonAttention(model.num_kv_heads, invariant_to=invariant_to)
    heads = model.num_heads, model.num_kv_heads, model.head_dim
    return TritonAttention(model.num_kv_heads, plan=partial(plan_long_prompts, device, dtype, *heads))


def product_for(device: torch.device, deterministic: bool) -> ProductMaker:
    """How matrix products are made."""
    if not deterministic:
        return product_with
    return invariant_product if device.type == "cuda" else steady_product


def resolve_settings(config: EngineConfig, files: ModelFiles, model: ModelConfig) -> Resolved:
    """Decide everything that is left to the machine. Raises `ConfigError` for what it cannot do."""
    device = choose_device(config)
    packing = choose_packing(config, files, model, device)
    dtype = torch.bfloat16 if packing else choose_dtype(config, model, device)
    gpu = device.type == "cuda"
    backend = TritonAttention if gpu else CpuAttention
    block_size = config.block_size or backend.default_block_size
    max_num_seqs = config.max_num_seqs or (256 if gpu else 64)
    max_batched = config.max_num_batched_tokens or (8192 if gpu else 512)
    check_limits(device, block_size, max_num_seqs, max_batched)
    fp8_cache = _fp8_cache(config, device)
    block_bytes = 2 * model.num_layers * model.num_kv_heads * block_size * model.head_dim
    block_bytes *= FP8.itemsize if fp8_cache else dtype.itemsize
    weights = held_weights(model, packing, dtype).bytes
    if (config.max_model_len or 0) > model.max_position:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the {model.max_position} positions that the model was made "
            "for", "max_model_len",
        )  # fmt: skip
    sizes = Sizes(
        model=model, itemsize=dtype.itemsize, block_size=block_size, block_bytes=block_bytes, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_batched, max_len=config.max_model_len or model.max_position,
        deterministic=config.deterministic,
    )  # fmt: skip
    if gpu:
        num_blocks = blocks_on_gpu(config, sizes, Card.of(device), weights, loaded=False)
    else:
        num_blocks = blocks_in_ram(config, model, weights, sizes)
    max_len = usable_length(config, model.max_position, num_blocks, block_size)
    return Resolved(
        device, dtype, block_size, num_blocks, max_len, max_num_seqs, max_batched, 1 if gpu else 0, packing,
        sizes if gpu else None, fp8_cache,
    )  # fmt: skip


def check_limits(device: torch.device, block_size: int, max_num_seqs: int, max_batched: int) -> None:
    """Raises `ConfigError` for numbers that do not go together."""
    if device.type == "cpu" and (block_size > KV_PAD or KV_PAD % block_size):
        raise ConfigError(f"block_size must divide {KV_PAD} on the CPU, not {block_size}", "block_size")
    if max_batched < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={max_batched} is less than max_num_seqs={max_num_seqs}: every running sequence "
            "needs a token of the budget", "max_num_batched_tokens",
        )  # fmt: skip


def choose_device(config: EngineConfig) -> torch.device:
    """Raises `ConfigError` for a GPU that is not there."""
    if config.device != "auto":
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError("device='cuda' was asked for, but torch sees no GPU: use device='cpu'", "device")
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fp8_cache(config: EngineConfig, device: torch.device) -> bool:
    if config.kv_cache_dtype == "auto":
        return False
    asked = f"kv_cache_dtype={config.kv_cache_dtype!r} needs an NVIDIA GPU of compute capability 8.9 or more"
    if device.type != "cuda":
        raise ConfigError(f"{asked}, this engine runs on {device.type!r}: leave it out", "kv_cache_dtype")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"{asked}, {name} has {major}.{minor}: leave it out", "kv_cache_dtype")
    return True


def choose_dtype(config: EngineConfig, model: DecoderConfig, device: torch.device) -> torch.dtype:
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
