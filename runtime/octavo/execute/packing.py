"""In which form weights are held: packed for the CPU's kernels or numbers of a torch type, and what that takes.

Called by `build`, which loads them so, and by what reports on an engine. Needs no weights, only the configuration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from octavo_kernels.cpu.compiler import available as cpu_kernels_available
from octavo_kernels.cpu.quantise import BLOCK, BYTES

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.layers.byte_linear import INPUTS_MULTIPLE
from octavo.models.config import ModelConfig
from octavo.models.llama_packed import CACHE_BLOCK
from octavo.models.llama_packed import supports as packed_supports
from octavo.models.packed_weights import Packing
from octavo.models.seq2seq_config import Seq2SeqConfig
from octavo.models.sources import ModelFiles

_ASKED: dict[str, Packing] = {"gguf": "file", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True, slots=True)
class Held:
    """`name`: for a report, "bfloat16" or "Q4_1 + Q8_0 (GGUF)"."""

    name: str
    bytes: int


def choose_packing(config: EngineConfig, files: ModelFiles, model: ModelConfig, device: torch.device) -> Packing | None:
    """None: numbers of a torch type. Raises `ConfigError` where a packing was asked for and cannot be.

    By default a GGUF file is run on its own bits where that can be: measured, it is several times as fast as bfloat16
    (see benchmarks/LOG.md). A type that was named is kept to."""
    asked = config.quantization
    if asked is None:
        fits = config.dtype == "auto" and next(_obstacles("file", config, files, model, device), None) is None
        return "file" if fits else None
    for why, field in _obstacles(_ASKED[asked], config, files, model, device):
        raise ConfigError(f"quantization={asked!r} {why}", field)
    return _ASKED[asked]


def _obstacles(
    packing: Packing, config: EngineConfig, files: ModelFiles, model: ModelConfig, device: torch.device
) -> Iterator[tuple[str, str]]:
    """(what stands against it and what to do, the field that says so)"""
    if packing == "file" and files.format != "gguf":
        yield "needs a GGUF file: use 'int8' or 'int4' for other models, or leave it out", "quantization"
    if device.type != "cpu" or not cpu_kernels_available():
        yield "needs a CPU with AVX512-VNNI and AVX512-BF16, on Linux: leave it out on other machines", "quantization"
    if not packed_supports(model):
        yield "needs sizes in multiples of 32 and no biases but those of QKV: leave it out here", "quantization"
    if packing == "file" and config.load_format != "auto":
        yield f"reads the file's weights, not load_format={config.load_format!r}: leave that out", "load_format"
    if config.dtype not in ("auto", "bfloat16"):
        yield f"keeps its cache in bfloat16, not {config.dtype}: leave dtype out", "dtype"
    if config.block_size not in (None, CACHE_BLOCK):
        yield f"has blocks of {CACHE_BLOCK} tokens, not {config.block_size}: leave block_size out", "block_size"


def rounds_to_bytes(config: EngineConfig, model: Seq2SeqConfig, device: torch.device) -> bool:
    """Whether an encoder-decoder gets weights of 8 bits. Raises `ConfigError` where they cannot be had."""
    asked = config.quantization
    if asked is None:
        return False
    for why in _byte_obstacles(asked, model, device):
        raise ConfigError(f"quantization={asked!r} {why}", "quantization")
    return True


def _byte_obstacles(asked: str, model: Seq2SeqConfig, device: torch.device) -> Iterator[str]:
    if asked != "int8":
        yield "is not for encoder-decoders: use 'int8', or leave it out"
    if device.type != "cpu" or not cpu_kernels_available():
        yield "needs a CPU with AVX512-VNNI and AVX512-BF16, on Linux: leave it out on other machines"
    if any(size % INPUTS_MULTIPLE for size in model.inner_sizes):
        yield f"needs sizes in multiples of {INPUTS_MULTIPLE}, not {model.inner_sizes}: leave it out here"


def held_by_seq2seq(config: EngineConfig, model: Seq2SeqConfig, dtype: torch.dtype) -> Held:
    """What the weights of an encoder-decoder take, in its matrices."""
    if config.quantization is None:
        return Held(str(dtype).removeprefix("torch."), model.parameters * dtype.itemsize)
    table = model.vocab_size * model.hidden_size * dtype.itemsize  # the head has bytes, the embedding does not
    return Held("int8", model.parameters + table)


def held_weights(model: ModelConfig, packing: Packing | None, dtype: torch.dtype) -> Held:
    """What the weights of a model take, in its matrices."""
    if packing is None:
        return Held(str(dtype).removeprefix("torch."), weight_count(model) * dtype.itemsize)
    tables = embedding_count(model)
    counts: dict[str, int] = {"Q8_0": weight_count(model)}
    if packing == "int4":
        counts = {"Q4_1": weight_count(model) - tables, "Q8_0": tables}
    if packing == "file":
        counts = Counter()
        for kind, count in model.stored:
            counts[kind if kind in BYTES else "Q8_0"] += count  # what the kernels do not know becomes Q8_0
    names = sorted(counts, key=lambda kind: -counts[kind])
    size = sum(count * BYTES[kind] // BLOCK for kind, count in counts.items())
    return Held(f"{' + '.join(names)} (GGUF)" if packing == "file" else packing, size)


def weight_count(model: ModelConfig) -> int:
    """Parameters of the model (its matrices)."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    mlp = 3 * model.hidden_size * model.intermediate_size
    return model.num_layers * (attention + mlp) + embedding_count(model)


def embedding_count(model: ModelConfig) -> int:
    """Those of embedding and head."""
    return model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
