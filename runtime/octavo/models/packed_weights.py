"""The weights of a Llama-like model in the layout of the CPU kernels. `execute.build` loads them for `llama_packed`.

All matrices lie in one piece of memory, in the order in which a step reads them, and are written there directly. A
`Source` gives the blocks of one matrix: `FileBits` as a GGUF file has them, `Rounded` made of the numbers of any file,
`Noise` without a file. `RECIPES` says whence which matrices come.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from octavo.errors import ModelFileError
from octavo.host_memory import zero_pages
from octavo.models.config import ModelConfig
from octavo.models.weights import WeightReader

if TYPE_CHECKING:
    from octavo_kernels.cpu.packed import Packed

Packing = Literal["file", "int8", "int4"]
"""As in a GGUF file; everything 8 bits; matrices of the layers 4 bits, embedding and head 8."""

LOAD_THREADS = 2
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


# ---------------------------------------------------------------- where blocks come from


class Source(Protocol):
    def kind(self, names: list[str]) -> str:
        """Of the blocks of these matrices, which become one."""

    def blocks(self, name: str, kind: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Of one matrix, some rows at a time: uint8 `[rows, bytes of a row]`. Raises `ModelFileError`."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Numbers of any file, rounded to blocks of one kind."""

    reader: WeightReader
    to: str

    def kind(self, names: list[str]) -> str:
        return self.to

    def blocks(self, name: str, kind: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        from octavo_kernels.cpu.quantise import quantise_q4, quantise_q8

        quantise = {"Q4_1": quantise_q4, "Q8_0": quantise_q8}[kind]
        self.reader.check_shape(name, shape)  # the kernels believe the sizes
        for numbers in self.reader.pieces(name, max(NUMBERS_AT_A_TIME // shape[1], 1)):
            yield quantise(numbers)
        self.reader.forget(name)


@dataclass(frozen=True, slots=True)
class FileBits:
    """The blocks of the file where these are of one kind; otherwise rounded to Q8_0."""

    reader: WeightReader

    def kind(self, names: list[str]) -> str:
        found = [self.reader.blocks(name) for name in names]
        kinds = {blocks[1] if blocks else "Q8_0" for blocks in found}
        return kinds.pop() if len(kinds) == 1 else "Q8_0"

    def blocks(self, name: str, kind: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        self.reader.check_shape(name, shape)
        found = self.reader.blocks(name)
        if found is None or found[1] != kind:
            yield from Rounded(self.reader, kind).blocks(name, kind, shape)
        else:
            yield found[0]
            self.reader.forget(name)


@dataclass(frozen=True, slots=True)
class Noise:
    """Random bits under scales that make them as large as the weights of models usually are (0.02, root mean square).
    Seeded by the names, like `weights.DummyWeights`."""

    of: str

    def kind(self, names: list[str]) -> str:
        return self.of

    def blocks(self, name: str, kind: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        from octavo_kernels.cpu.quantise import BLOCK, BYTES

        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bits, middle = (4, 7.5) if kind == "Q4_1" else (8, 0)
        scale = 0.02 * 12**0.5 / 2**bits  # of numbers that are equally often each of 2**bits
        halves = torch.tensor([scale, -middle * scale] if middle else [scale], dtype=torch.float16).view(torch.uint8)
        rows = max(NUMBERS_AT_A_TIME // shape[1], 1)
        for first in range(0, shape[0], rows):
            count = min(rows, shape[0] - first) * shape[1] // BLOCK
            words = torch.empty(-(-count * BYTES[kind] // 8), dtype=torch.int64)
            words.random_(-(2**63), None, generator=generator)
            blocks = words.view(torch.uint8)[: count * BYTES[kind]].view(count, BYTES[kind])
            blocks[:, : len(halves)] = halves
            yield blocks.view(-1, shape[1] // BLOCK * BYTES[kind])


@dataclass(frozen=True, slots=True)
class Recipe:
    layers: Source
    tables: Source
    """Embedding and head."""


RECIPES: dict[Packing, Callable[[WeightReader], Recipe]] = {
    # embedding and head stay at 8 bits, as in llama.cpp's files: an error there goes straight into the logits
    "file": lambda reader: Recipe(FileBits(reader), FileBits(reader)),
    "int8": lambda reader: Recipe(Rounded(reader, "Q8_0"), Rounded(reader, "Q8_0")),
    "int4": lambda reader: Recipe(Rounded(reader, "Q4_1"), Rounded(reader, "Q8_0")),
}


def noise_recipe(packing: Packing) -> Recipe:
    """For `load_format="dummy"`."""
    return Recipe(Noise("Q4_1" if packing == "int4" else "Q8_0"), Noise("Q8_0"))


# ---------------------------------------------------------------- loading


@dataclass(slots=True)
class _Matrix:
    """One matrix to come: named ones under each other (name -> outputs)."""

    parts: dict[str, int]
    inputs: int
    source: Source
    kind: str
    packed: Packed | None = None

    @property
    def outputs(self) -> int:
        return sum(self.parts.values())

    def load(self, reader: WeightReader) -> Packed:
        from octavo_kernels.cpu.packed import Packer

        assert self.packed is not None
        packer = Packer(self.packed, self.kind)
        for name, rows in self.parts.items():
            for blocks in self.source.blocks(name, self.kind, (rows, self.inputs)):
                packer.add(blocks)
        packer.finish()
        if (row := self.packed.first_bad_row()) is not None:
            ends = zip(self.parts, accumulate(self.parts.values()), strict=True)
            broken = next(name for name, end in ends if row < end)
            message = "holds numbers that are not finite, or too large for blocks of 4 or 8 bits"
            raise ModelFileError(message, file=reader.place, field=broken)
        return self.packed


def load_packed(
    reader: WeightReader, config: ModelConfig, recipe: Recipe,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> PackedWeights:  # fmt: skip
    """Raises `ModelFileError` naming the tensor that is missing, of another size or not of finite numbers: softmax
    would hide a NaN that is only in queries or keys, and no request would fail of it."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    matrices = [_layer_matrices(config, index, recipe.layers) for index in range(config.num_layers)]
    embedding = head = _matrix({"model.embed_tokens.weight": vocabulary}, hidden, recipe.tables)
    if not config.tie_word_embeddings:
        head = _matrix({"lm_head.weight": vocabulary}, hidden, recipe.tables)
    tables = [embedding] if head is embedding else [embedding, head]
    _give_memory([matrix for layer in matrices for matrix in layer.values()] + tables)

    done, steps = 0, config.num_layers + 1
    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        # the largest first, so that no thread is left alone with it at the end
        waiting_tables = [pool.submit(table.load, reader) for table in tables]
        waiting = [pool.submit(_load_layer, reader, config, at, layer) for at, layer in enumerate(matrices)]
        try:
            layers = []
            for layer in waiting:
                layers.append(layer.result())
                done += 1
                if progress is not None:
                    progress("loading", done, steps)
            loaded = [table.result() for table in waiting_tables]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    final_norm = _vector(reader, "model.norm.weight", hidden)
    if progress is not None:
        progress("loading", steps, steps)
    return PackedWeights(layers, loaded[0], loaded[-1], final_norm)


def _matrix(parts: dict[str, int], inputs: int, source: Source) -> _Matrix:
    return _Matrix(parts, inputs, source, source.kind(list(parts)))


def _layer_matrices(config: ModelConfig, index: int, source: Source) -> dict[str, _Matrix]:
    """In the order in which a step reads them."""
    attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
    hidden, inner, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    projections = {attention + f"{name}_proj.weight": size for name, size in _projections(config).items()}
    gate_up = {mlp + "gate_proj.weight": inner, mlp + "up_proj.weight": inner}
    return {
        "qkv": _matrix(projections, hidden, source),
        "out": _matrix({attention + "o_proj.weight": hidden}, q, source),
        "gate_up": _matrix(gate_up, hidden, source),
        "down": _matrix({mlp + "down_proj.weight": hidden}, inner, source),
    }


def _projections(config: ModelConfig) -> dict[str, int]:
    kv = config.num_kv_heads * config.head_dim
    return {"q": config.num_heads * config.head_dim, "k": kv, "v": kv}


def _give_memory(matrices: list[_Matrix]) -> None:
    """Large pages: a step of one token took 3.24 ms with them, 3.33 without (medians of 40 in turns, by hand; at best
    2.57 and 2.79)."""
    from octavo_kernels.cpu.packed import empty_packed, packed_bytes

    sizes = [packed_bytes(matrix.kind, matrix.outputs, matrix.inputs) for matrix in matrices]
    for matrix, piece in zip(matrices, torch.split(zero_pages(sum(sizes), large=True), sizes), strict=True):
        matrix.packed = empty_packed(matrix.kind, matrix.outputs, matrix.inputs, piece)


def _load_layer(reader: WeightReader, config: ModelConfig, index: int, matrices: dict[str, _Matrix]) -> PackedLayer:
    prefix = f"model.layers.{index}."
    attention = prefix + "self_attn."
    bias = None
    if config.qkv_bias:
        biases = [_vector(reader, f"{attention}{name}_proj.bias", size) for name, size in _projections(config).items()]
        bias = torch.cat(biases)
    norms = (f"{attention}{part}_norm.weight" if config.qk_norm else None for part in "qk")
    q_norm, k_norm = (_vector(reader, name, config.head_dim) if name else None for name in norms)
    return PackedLayer(
        **{name: matrix.load(reader) for name, matrix in matrices.items()},
        attention_norm=_vector(reader, prefix + "input_layernorm.weight", config.hidden_size),
        mlp_norm=_vector(reader, prefix + "post_attention_layernorm.weight", config.hidden_size),
        bias=bias, q_norm=q_norm, k_norm=k_norm,
    )  # fmt: skip


def _vector(reader: WeightReader, name: str, size: int) -> torch.Tensor:
    found = torch.empty(size, dtype=torch.float32)
    reader.copy_into(name, found)
    if not found.isfinite().all():
        raise ModelFileError("holds numbers that are not finite", file=reader.place, field=name)
    return found
