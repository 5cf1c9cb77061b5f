"""The weights of a Llama-like model in the layout of the CPU kernels. `execute.build` loads them for `llama_packed`.

A *maker* makes one packed matrix out of named ones under each other: `keep_bits` takes the blocks of a GGUF file as
they are, `round_to` rounds numbers of any file, `noise` needs no file. `RECIPES` says who makes which matrices.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from octavo.errors import ModelFileError
from octavo.host_memory import zero_pages
from octavo.models.config import ModelConfig
from octavo.models.weights import WeightReader

if TYPE_CHECKING:
    from octavo_kernels.cpu.linear import Packed

Packing = Literal["file", "int8", "int4"]
"""As in a GGUF file; everything 8 bits; matrices of the layers 4 bits, embedding and head 8."""
Maker = Callable[[dict[str, int], int], "Packed"]
"""From names of matrices (-> outputs) and their inputs to one matrix."""

LOAD_THREADS = 2
LINE = 64
"""Bytes of a line of the cache."""
NUMBERS_AT_A_TIME = 1 << 22
"""Of a matrix that is rounded: 16 MB as float32 in each thread."""


@dataclass(slots=True)
class PackedLayer:
    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass(slots=True)
class PackedWeights:
    layers: list[PackedLayer]
    embedding: Packed
    head: Packed
    """The embedding itself where the two are tied."""
    final_norm: torch.Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    linear: Maker
    embedding: Maker
    head: Maker


def _as_in_file(reader: WeightReader) -> Recipe:
    return Recipe(keep_bits(reader), keep_bits(reader), keep_bits(reader))


def _rounded(linear: str) -> Callable[[WeightReader], Recipe]:
    # embedding and head stay at 8 bits, as in llama.cpp's files: an error there goes straight into the logits
    return lambda reader: Recipe(round_to(reader, linear), round_to(reader, "Q8_0"), round_to(reader, "Q8_0"))


RECIPES: dict[Packing, Callable[[WeightReader], Recipe]] = {
    "file": _as_in_file, "int8": _rounded("Q8_0"), "int4": _rounded("Q4_1"),
}  # fmt: skip


def noise_recipe(packing: Packing) -> Recipe:
    """For `load_format="dummy"`."""
    return Recipe(noise("Q4_1" if packing == "int4" else "Q8_0"), noise("Q8_0"), noise("Q8_0"))


def load_packed(
    reader: WeightReader, config: ModelConfig, recipe: Recipe,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> PackedWeights:  # fmt: skip
    """Raises `ModelFileError` naming the tensor that is missing, of another size or not of finite numbers: softmax
    would hide a NaN that is only in queries or keys, and no request would fail of it."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    done, steps = 0, config.num_layers + 1
    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        # the largest first, so that no thread is left alone with it at the end
        embedding = pool.submit(recipe.embedding, {"model.embed_tokens": vocabulary}, hidden)
        untied = None if config.tie_word_embeddings else pool.submit(recipe.head, {"lm_head": vocabulary}, hidden)
        waiting = [pool.submit(_load_layer, reader, config, index, recipe.linear) for index in range(config.num_layers)]
        try:
            layers = []
            for layer in waiting:
                layers.append(layer.result())
                done += 1
                if progress is not None:
                    progress("loading", done, steps)
            table = embedding.result()
            head = untied.result() if untied else table
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    final_norm = _vector(reader, "model.norm.weight", hidden)
    if progress is not None:
        progress("loading", steps, steps)
    weights = PackedWeights(layers, table, head, final_norm)
    _into_large_pages(weights)
    return weights


def _into_large_pages(weights: PackedWeights) -> None:
    """Move the matrices, in the order in which a step reads them, into one piece of large pages. A step of one token
    took 3.24 ms there and 3.33 in small pages (medians of 40 in turns, by hand; at best 2.57 and 2.79)."""
    places: list[tuple[object, str]] = [
        (layer, name) for layer in weights.layers for name in ("qkv", "out", "gate_up", "down")
    ]
    places += [(weights, "embedding")]
    tied = weights.head is weights.embedding
    if not tied:
        places.append((weights, "head"))
    sizes = [-(-size // LINE) * LINE for owner, name in places for size in _sizes(getattr(owner, name))]
    memory = zero_pages(sum(sizes), large=True)
    pieces = iter(torch.split(memory, sizes))
    for owner, name in places:
        packed: Packed = getattr(owner, name)
        moved: dict[str, Any] = {field: _moved(getattr(packed, field), next(pieces)) for field in _held(packed)}
        setattr(owner, name, replace(packed, **moved))
    if tied:
        weights.head = weights.embedding


def _held(packed: Packed) -> list[str]:
    return [name for name in ("quants", "scales", "minima") if getattr(packed, name) is not None]


def _sizes(packed: Packed) -> list[int]:
    return [getattr(packed, name).nbytes for name in _held(packed)]


def _moved(tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


# ---------------------------------------------------------------- makers


def keep_bits(reader: WeightReader) -> Maker:
    """The blocks of the file where these are of one kind; otherwise rounded to Q8_0."""
    from octavo_kernels.cpu.linear import pack
    from octavo_kernels.cpu.quantise import are_finite

    rounded = round_to(reader, "Q8_0")

    @torch.inference_mode()
    def make(parts: dict[str, int], inputs: int) -> Packed:
        names = _checked(reader, parts, inputs)
        blocks = [reader.blocks(name) for name in names]
        kinds = {found[1] if found else None for found in blocks}
        if len(kinds) > 1 or None in kinds:
            return rounded(parts, inputs)
        rows, kind = [found[0] for found in blocks if found], kinds.pop() or ""
        packed = pack(rows[0] if len(rows) == 1 else torch.cat(rows), kind, inputs)
        if not all(halves is None or halves.isfinite().all() for halves in (packed.scales, packed.minima)):
            broken = next(name for name, part in zip(names, rows, strict=True) if not are_finite(part, kind))
            raise ModelFileError("holds numbers that are not finite", file=reader.place, field=broken)
        for name in names:
            reader.forget(name)
        return packed

    return make


def round_to(reader: WeightReader, kind: str) -> Maker:
    """Numbers of any file as blocks of `kind`, some rows at a time."""
    from octavo_kernels.cpu.linear import pack
    from octavo_kernels.cpu.quantise import are_finite, quantise_q4, quantise_q8

    quantise = {"Q4_1": quantise_q4, "Q8_0": quantise_q8}[kind]

    @torch.inference_mode()
    def make(parts: dict[str, int], inputs: int) -> Packed:
        made = []
        for name in _checked(reader, parts, inputs):
            for piece in reader.pieces(name, max(NUMBERS_AT_A_TIME // inputs, 1)):
                made.append(quantise(piece))
                if not are_finite(made[-1], kind):
                    message = "holds numbers that are not finite, or too large for blocks of 4 or 8 bits"
                    raise ModelFileError(message, file=reader.place, field=name)
            reader.forget(name)
        return pack(made[0] if len(made) == 1 else torch.cat(made), kind, inputs)

    return make


def noise(kind: str) -> Maker:
    """Random bits under scales that make them as large as the weights of models usually are (0.02, root mean square).
    Seeded by the names, like `weights.DummyWeights`."""
    from octavo_kernels.cpu.linear import GROUP, Packed

    @torch.inference_mode()
    def make(parts: dict[str, int], inputs: int) -> Packed:
        bits, zero = (4, 0) if kind == "Q4_1" else (8, 128)
        outputs = -(-sum(parts.values()) // GROUP) * GROUP
        generator = torch.Generator().manual_seed(zlib.crc32(" ".join(parts).encode()))
        words = torch.empty(outputs * inputs * bits // 64, dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator)
        scale = 0.02 * 12**0.5 / 2**bits  # of numbers that are equally often 0 to 2**bits - 1
        scales = torch.full((outputs // GROUP, inputs // 32, GROUP), scale, dtype=torch.float16)
        minima = scales * -7.5 if kind == "Q4_1" else None
        return Packed(bits, outputs, inputs, words.view(torch.uint8), scales, minima, zero)

    return make


def _checked(reader: WeightReader, parts: dict[str, int], inputs: int) -> list[str]:
    """The names of the tensors. The kernels believe the sizes, so a file that has others is refused here."""
    for name, outputs in parts.items():
        reader.check_shape(f"{name}.weight", (outputs, inputs))
    return [f"{name}.weight" for name in parts]


# ---------------------------------------------------------------- parts of a model


def _vector(reader: WeightReader, name: str, size: int) -> torch.Tensor:
    found = torch.empty(size, dtype=torch.float32)
    reader.copy_into(name, found)
    if not found.isfinite().all():
        raise ModelFileError("holds numbers that are not finite", file=reader.place, field=name)
    return found


@torch.inference_mode()
def _load_layer(reader: WeightReader, config: ModelConfig, index: int, make: Maker) -> PackedLayer:
    prefix = f"model.layers.{index}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    hidden, inner, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    projections = {attention + "q_proj": q, attention + "k_proj": kv, attention + "v_proj": kv}
    bias = None
    if config.qkv_bias:
        bias = torch.cat([_vector(reader, f"{name}.bias", size) for name, size in projections.items()])
    norms = (f"{attention}{part}_norm.weight" if config.qk_norm else None for part in "qk")
    q_norm, k_norm = (_vector(reader, name, config.head_dim) if name else None for name in norms)
    return PackedLayer(
        qkv=make(projections, hidden), out=make({attention + "o_proj": hidden}, q),
        gate_up=make({mlp + "gate_proj": inner, mlp + "up_proj": inner}, hidden),
        down=make({mlp + "down_proj": hidden}, inner),
        attention_norm=_vector(reader, prefix + "input_layernorm.weight", hidden),
        mlp_norm=_vector(reader, prefix + "post_attention_layernorm.weight", hidden),
        bias=bias, q_norm=q_norm, k_norm=k_norm,
    )  # fmt: skip
