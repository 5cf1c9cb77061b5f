"""An encoder-decoder on the device, from settings and files to a running `EngineCore`. Called by the engine
registry."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from octavo_kernels.cpu.compiler import keep_objects_in

from octavo.attention.base import AttentionBackend
from octavo.attention.cpu import KV_PAD, CpuAttention
from octavo.config import EngineConfig
from octavo.engine.blocks import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import Scheduler
from octavo.engine.turns import PROCESS_CORES, Turn
from octavo.errors import ConfigError, ModelFileError
from octavo.execute.build import (
    Resolved,
    attention_for,
    check_limits,
    choose_device,
    choose_dtype,
    limit_torch_threads,
    make_kv_cache,
)
from octavo.execute.lost import is_lost
from octavo.execute.packing import held_by_seq2seq, rounds_to_bytes
from octavo.execute.rehearsal import rehearse
from octavo.execute.sizing import Card, Sizes, blocks_in_ram, blocks_on_gpu, usable_length
from octavo.execute.sources import Seq2SeqRunner, SourceTable
from octavo.execute.table import RowTable
from octavo.layers.byte_linear import byte_product
from octavo.layers.linear import ProductMaker, packed_product
from octavo.models.cache import cache_dir
from octavo.models.loader import Progress, fill
from octavo.models.m2m100 import M2M100Family
from octavo.models.seq2seq_config import Seq2SeqConfig, refuse_on
from octavo.models.sources import ModelFiles
from octavo.models.t5 import T5Family
from octavo.models.weights import WeightReader, open_dummy, open_folder

Family = M2M100Family | T5Family


def resolve_seq2seq(config: EngineConfig, model: Seq2SeqConfig) -> Resolved:
    """Decide everything that is left to the machine. Raises `ConfigError` for what these models cannot do."""
    if config.deterministic:
        raise ConfigError("an encoder-decoder cannot run deterministic yet: leave it out", "deterministic")
    if config.kv_cache_dtype != "auto":
        message = "the KV cache of an encoder-decoder has the type of its activations: leave kv_cache_dtype out"
        raise ConfigError(message, "kv_cache_dtype")
    device = choose_device(config)
    refuse_on(model, device.type)
    rounds_to_bytes(config, model, device)
    gpu = device.type == "cuda"
    dtype = choose_dtype(config, model, device)
    block_size = config.block_size or 16
    max_num_seqs = config.max_num_seqs or (256 if gpu else 128)  # each beam takes one
    max_batched = config.max_num_batched_tokens or (8192 if gpu else 512)
    check_limits(device, block_size, max_num_seqs, max_batched)
    if (config.max_model_len or 0) > model.max_position and not model.relative_buckets:
        message = f"max_model_len={config.max_model_len} exceeds the {model.max_position} positions of the model"
        raise ConfigError(message, "max_model_len")
    sizes = Sizes(
        model=model, itemsize=dtype.itemsize, block_size=block_size,
        block_bytes=2 * model.num_layers * model.num_heads * block_size * model.head_dim * dtype.itemsize,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_batched,
        max_len=config.max_model_len or model.max_position,
    )  # fmt: skip
    weights = held_by_seq2seq(config, model, dtype).bytes
    if gpu:
        num_blocks = blocks_on_gpu(config, sizes, Card.of(device), weights, loaded=False)
    else:
        num_blocks = blocks_in_ram(config, model, weights, sizes)
    max_len = usable_length(config, model.max_position, num_blocks, block_size)
    return Resolved(
        device, dtype, block_size, num_blocks, max_len, max_num_seqs, max_batched, 1 if gpu else 0, None,
        sizes if gpu else None,
    )  # fmt: skip


def build_seq2seq(
    config: EngineConfig, files: ModelFiles, model_config: Seq2SeqConfig, resolved: Resolved,
    progress: Progress | None = None,
) -> EngineCore:  # fmt: skip
    """Load the model and put an engine around it."""
    threads = limit_torch_threads()
    keep_objects_in(cache_dir() / "kernels")
    product = byte_product if rounds_to_bytes(config, model_config, resolved.device) else packed_product
    dummy = config.load_format == "dummy"
    with open_dummy() if dummy else open_folder(files) as reader:
        model = load_seq2seq(reader, model_config, resolved, dummy=dummy, progress=progress, product=product)
    turns: AbstractContextManager[None] = nullcontext()
    if resolved.device.type == "cpu":
        turns = Turn(PROCESS_CORES, threads)
    return core_around(model, model_config, resolved, caching=config.enable_prefix_caching, turns=turns)


def core_around(
    model: Family, config: Seq2SeqConfig, resolved: Resolved, *, caching: bool = True,
    turns: AbstractContextManager[None] = nullcontext(),  # noqa: B008 (it has no state)
) -> EngineCore:  # fmt: skip
    """An engine of a loaded model."""
    rows, length, size, device = resolved.max_num_seqs, resolved.max_model_len, resolved.block_size, resolved.device
    scheduler = Scheduler(
        BlockPool(resolved.num_blocks, size, caching=caching), max_num_seqs=rows,
        max_num_batched_tokens=resolved.max_num_batched_tokens, clock=time.monotonic,
    )  # fmt: skip
    runner = Seq2SeqRunner(
        model, make_kv_cache(config, resolved), RowTable(rows, length, size, config.vocab_size, device),
        _attention(device, resolved.dtype, config, size), SourceTable(rows, length, size, KV_PAD, device),
        config.never_ids,
    )  # fmt: skip
    if device.type == "cuda":
        rehearse(runner, config.num_kv_heads, length)
    return EngineCore(scheduler, runner, depth=resolved.depth, turns=turns, is_lost=is_lost(resolved.device))


def _attention(
    device: torch.device, dtype: torch.dtype, config: Seq2SeqConfig, block_size: int
) -> AttentionBackend:
    """Sources and outputs are sentences as a rule: padding them to 64 keys would cost more than attending to them."""
    return CpuAttention(dtype, block_size) if device.type == "cpu" else attention_for(device, dtype, config)


def load_seq2seq(
    reader: WeightReader, config: Seq2SeqConfig, resolved: Resolved, *, dummy: bool = False,
    progress: Progress | None = None, product: ProductMaker = packed_product,
) -> Family:  # fmt: skip
    """Raises `ModelFileError` where weights and configuration do not fit together."""
    family = T5Family if config.relative_buckets else M2M100Family
    model: Family = family(config, max_len=resolved.max_model_len, dtype=resolved.dtype, device=resolved.device)
    given = set(reader.names())
    model.adapt(given)
    targets = model.targets()
    places = targets if dummy else dict(_named(targets, model, given, reader.place))
    targets = {}  # a view of a weight would keep it in memory
    with torch.inference_mode():
        fill(reader, places, progress)
        model.finish(product)
    return model


def _named(
    targets: Mapping[str, torch.Tensor], model: Family, given: set[str], place: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the checkpoint calls each tensor."""
    for name, dest in targets.items():
        found = next((known for known in (name, *model.aliases.get(name, ())) if known in given), None)
        if found is not None:
            yield found, dest
        elif name in model.optional:
            dest.zero_()
        else:
            raise ModelFileError("the weights lack this tensor", place, name)
