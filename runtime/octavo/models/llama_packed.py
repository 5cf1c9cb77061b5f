"""The Llama family on the CPU with the weights kept in the bits of a GGUF file: one program a step.

Used by `execute.build` instead of `llama.LlamaFamily` where the kernels run (`kernels/octavo_kernels/cpu`). A step is
a list of kernels that all threads run from one call: embedding, then for each layer norm, QKV, rotation and cache,
attention, output, norm, gate and up, SiLU, down. Weights of other types than Q4_0, Q4_1 and Q8_0 become Q8_0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from octavo.attention.base import AttentionBackend, LayerCache, PreparedAttention
from octavo.execute.context import ForwardContext, KVCache, StepInputs
from octavo.layers.rope import cos_sin_table
from octavo.models.config import ModelConfig
from octavo.models.packed_weights import PackedWeights

if TYPE_CHECKING:
    from octavo_kernels.cpu.compiler import Library
    from octavo_kernels.cpu.decoder import Shape
    from octavo_kernels.cpu.packed import Packed
    from octavo_kernels.cpu.program import Program

_Step = tuple[str, Sequence[int | torch.Tensor | None]]
"""A kernel's name and its arguments."""
CACHE_BLOCK = 32
LOGIT_ROWS = 64
"""Rows whose logits are computed at once."""


def supports(config: ModelConfig) -> bool:
    """The sizes fit the kernels: everything in whole blocks of 32 values, no biases but those of QKV."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim, config.num_heads * config.head_dim)
    return not any(size % 32 for size in sizes) and not config.o_bias and not config.mlp_bias


class ProgramAttention(AttentionBackend):
    """The attention is part of the program: there is nothing to prepare."""

    default_block_size = CACHE_BLOCK

    def prepare(self, inputs: StepInputs) -> PreparedAttention:
        return _InProgram()


class _InProgram(PreparedAttention):
    def attend(
        self, q: torch.Tensor, cache: LayerCache, *, scale: float, window: int,
        distance_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        raise RuntimeError("the attention of a packed model runs in its program")


class PackedLlama:
    """`max_tokens`: the most that a step has; `kv`: the cache that the program writes to and reads from."""

    def __init__(
        self, config: ModelConfig, weights: PackedWeights, kv: KVCache, *, max_len: int, max_tokens: int, threads: int,
        cache: Path,
    ) -> None:  # fmt: skip
        from octavo_kernels.cpu import decoder, program

        self.config, self._weights, self._kv = config, weights, kv
        self._cos_sin = cos_sin_table(config, max_len, torch.device("cpu"))
        self._tile = max(1, decoder.TILE_ROWS // (config.num_heads // config.num_kv_heads))
        self._kernels = _Kernels(config, self._tile)
        self._buffers = _Buffers(config, max_tokens, self._weights.head.outputs)
        forward, logits = self._forward_steps(), self._logits_steps()
        self._library = self._kernels.library(cache)
        self._forward, self._logits = self._program(forward), self._program(logits)
        self._team = program.Team(self._library, threads, yields=True)

    # ---------------------------------------------------------------- what the runner calls

    def forward(self, context: ForwardContext) -> torch.Tensor:
        inputs, tokens = context.inputs, context.inputs.input_ids.shape[0]
        counts = inputs.counts
        if inputs.max_query_len == 1:
            rows = inputs.rows
            items = np.ones((tokens, 2), dtype=np.int32)
            items[:, 0] = np.arange(tokens)
        else:
            rows = torch.repeat_interleave(inputs.rows, torch.tensor(counts), output_size=tokens)
            listed, first = [], 0
            for count in counts:
                listed += [(first + at, min(self._tile, count - at)) for at in range(0, count, self._tile)]
                first += count
            items = np.array(listed, dtype=np.int32)
        table = inputs.block_table
        step = torch.tensor([
            tokens, inputs.input_ids.data_ptr(), inputs.positions.data_ptr(), inputs.slots.data_ptr(), rows.data_ptr(),
            items.ctypes.data, len(items), table.data_ptr(), table.stride(0),
        ])  # fmt: skip
        self._team.run(self._forward, step)
        return self._buffers.hidden[:tokens]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] -> [S, V] float32. Up to `LOGIT_ROWS` rows share a buffer, which the next call writes again."""
        if len(hidden) > LOGIT_ROWS:
            return torch.cat([self.logits(part).clone() for part in torch.split(hidden, LOGIT_ROWS)])
        buffers = self._buffers
        buffers.chosen.numpy()[: len(hidden)] = hidden.numpy()  # not by torch's threads: see `execute/rows.py`
        self._team.run(self._logits, torch.tensor([len(hidden)]))
        return buffers.logits[: len(hidden), : self.config.vocab_size]

    # ---------------------------------------------------------------- the programs

    def _program(self, steps: Sequence[_Step]) -> Program:
        from octavo_kernels.cpu.program import Program

        return Program([(self._library.address(name), args) for name, args in steps])

    def _product(self, packed: Packed, y: torch.Tensor, *, add: bool = False) -> _Step:
        name, b = self._kernels.product(packed, add=add), self._buffers
        return name, [packed.quants, packed.scales, packed.minima, b.bytes, b.planes, y, packed.outputs]

    def _forward_steps(self) -> list[_Step]:
        b, kernels, layers = self._buffers, self._kernels, self._weights.layers
        table = self._weights.embedding
        steps: list[_Step] = [(kernels.embed(table), [table.quants, table.scales, table.minima, b.residual])]
        for index, layer in enumerate(layers):
            keys, values = self._kv.layers[index].keys, self._kv.layers[index].values
            stride = keys.stride(0) * keys.element_size()
            steps += [
                (kernels.norm(quantised=True), [b.residual, layer.attention_norm, b.bytes, b.planes]),
                self._product(layer.qkv, b.qkv),
                (
                    kernels.rotate(),
                    [b.qkv, self._cos_sin, b.queries, keys, values, layer.bias, layer.q_norm, layer.k_norm, stride],
                ),
                (
                    kernels.attention(self.config.layer_windows[index]),
                    [b.queries, keys, values, b.bytes, b.planes, stride],
                ),
                self._product(layer.out, b.residual, add=True),
                (kernels.norm(quantised=True), [b.residual, layer.mlp_norm, b.bytes, b.planes]),
                self._product(layer.gate_up, b.gate_up),
                (kernels.gate(), [b.gate_up, b.bytes, b.planes]),
                self._product(layer.down, b.residual, add=True),
            ]
        return [*steps, (kernels.norm(quantised=False), [b.residual, self._weights.final_norm, b.hidden])]

    def _logits_steps(self) -> list[_Step]:
        b = self._buffers
        quantise = (self._kernels.quantise(), [b.chosen, b.bytes, b.planes])
        return [quantise, self._product(self._weights.head, b.logits)]


class _Buffers:
    """Activations of a step. Memory is taken when it is first touched, so a short step costs little."""

    def __init__(self, config: ModelConfig, tokens: int, outputs: int) -> None:
        def zeros(*shape: int, dtype: type = np.float32) -> torch.Tensor:
            return torch.from_numpy(np.zeros(shape, dtype=dtype))

        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        widest = max(config.hidden_size, config.intermediate_size, heads * dim)
        rows = max(tokens, LOGIT_ROWS)
        self.residual, self.hidden = zeros(tokens, config.hidden_size), zeros(tokens, config.hidden_size)
        self.qkv = zeros(tokens, (heads + 2 * kv_heads) * dim)
        self.queries = zeros(tokens, heads * dim, dtype=np.int16)
        self.gate_up = zeros(tokens, 2 * config.intermediate_size)
        self.bytes, self.planes = zeros(rows, widest, dtype=np.int8), zeros(rows, 3 * widest // 32)
        self.chosen, self.logits = zeros(LOGIT_ROWS, config.hidden_size), zeros(LOGIT_ROWS, outputs)


class _Kernels:
    """The kernels that a model needs, by name: noted when a step asks for them, written if they must be compiled."""

    def __init__(self, config: ModelConfig, tile: int) -> None:
        from octavo_kernels.cpu import decoder, linear

        self._config, self._tile, self._decoder, self._linear = config, tile, decoder, linear
        self._writers: dict[str, Callable[[object], None]] = {}

    def library(self, cache: Path) -> Library:
        from octavo_kernels.cpu.compiler import Library

        c = self._config
        sizes = (c.hidden_size, c.intermediate_size, c.qkv_bias, c.qk_norm, self._tile, self._shape(0))
        return Library(self._module, cache=cache, key=repr((sizes, sorted(self._writers))))

    def _module(self) -> object:
        from llvmlite import ir
        from octavo_kernels.cpu import program

        module = ir.Module("octavo")
        program.functions(module)
        for write in self._writers.values():
            write(module)
        return module

    def _noted(self, name: str, write: Callable[[object], None]) -> str:
        """A name says everything that is not a size of the model."""
        self._writers.setdefault(name, write)
        return name

    def product(self, packed: Packed, *, add: bool) -> str:
        bits, inputs, zero, minima = packed.bits, packed.inputs, packed.zero, packed.minima is not None
        name = f"multiply_{bits}_{inputs}_{zero}_{'add' if add else 'set'}"
        return self._noted(name, lambda module: self._linear.multiply(
            module, name, bits, inputs, minima=minima, zero=zero, add=add
        ))  # fmt: skip

    def quantise(self) -> str:
        size = self._config.hidden_size
        return self._noted("quantise", lambda module: self._linear.quantise_rows(module, "quantise", size))

    def embed(self, packed: Packed) -> str:
        bits, zero, minima, size = packed.bits, packed.zero, packed.minima is not None, self._config.hidden_size
        name = f"embed_{bits}_{zero}"
        return self._noted(
            name, lambda module: self._decoder.embed(module, name, size, bits, minima=minima, zero=zero)
        )

    def norm(self, *, quantised: bool) -> str:
        name = "norm_quantised" if quantised else "norm"
        return self._noted(name, lambda module: self._decoder.norm(
            module, name, self._config.hidden_size, self._config.rms_norm_eps, quantised=quantised
        ))  # fmt: skip

    def rotate(self) -> str:
        bias, qk_norm = self._config.qkv_bias, self._config.qk_norm
        return self._noted("rotate", lambda module: self._decoder.rotate_and_cache(
            module, "rotate", self._shape(0), bias=bias, qk_norm=qk_norm
        ))  # fmt: skip

    def attention(self, window: int) -> str:
        name, shape, tile = f"attention_{window}", self._shape(window), self._tile
        return self._noted(name, lambda module: self._decoder.attention(module, name, shape, tile))

    def gate(self) -> str:
        size = self._config.intermediate_size
        return self._noted("gate", lambda module: self._decoder.gate(module, "gate", size))

    def _shape(self, window: int) -> Shape:
        c = self._config
        return self._decoder.Shape(c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps, window)
