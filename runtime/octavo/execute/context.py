"""What one step hands to the model: token ids, positions, and the `ForwardContext` by which layers reach the KV
cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.attention.base import LayerCache, PreparedAttention
from octavo.execute.rows import copy_columns

COPIED_AT_ONCE = 2**24
"""Bytes. A block of an 8B model has 2 MiB, and 256 beams may copy one each."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By bytes, a type whose copies are the same bits."""


@dataclass(slots=True)
class StepInputs:
    """Device tensors of one step, and the few lengths that the host knows without asking the device.

    Sequences with a single token come first (`num_decodes` of them). T may be padded: then slots are -1."""

    input_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    slots: torch.Tensor
    """[T] int64 slot in the cache, `block * block_size + offset`."""
    rows: torch.Tensor
    """[B] int32."""
    query_start: torch.Tensor
    """[B + 1] int32."""
    seq_lens: torch.Tensor
    """[B] int32 tokens of each sequence, this step's included."""
    block_table: torch.Tensor
    """[rows, max_blocks] int32."""
    block_size: int
    host_rows: list[int]
    counts: list[int]
    lengths: list[int]
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    shared_parts: torch.Tensor | None = None
    """[1] int32: see `AttentionBackend.shared_parts`. None: not asked for."""


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of all layers. Block 0 stays zero."""

    layers: list[LayerCache]
    memory: torch.Tensor
    """`[2 * layers, num_blocks, KH, block_size, D]`, keys and values of a layer side by side: all of `layers`."""

    @classmethod
    def of(cls, memory: torch.Tensor, scales: list[torch.Tensor] | None = None) -> KVCache:
        """`scales`: of each layer, for FP8."""
        pairs = zip(memory[::2], memory[1::2], strict=True)
        layers = [LayerCache(*pair, None if scales is None else scales[n]) for n, pair in enumerate(pairs)]
        return cls(layers, memory)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them, each `[num_blocks, KH, block_size, D]`."""
        return list(self.memory)

    def copy_blocks(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """Copy whole blocks, in order: one that is read may be written by a later copy, never by an earlier one. Of all
        layers at once, because beams copy blocks in most steps: layer by layer, the default model's took 28 ms on 2
        busy cores."""
        memory = self.memory.view(_BITS[self.memory.itemsize])  # torch copies no FP8 by index, numpy no bfloat16
        at_once = max(1, COPIED_AT_ONCE // (self.memory.nbytes // memory.shape[1]))
        for begin in range(0, len(sources), at_once):
            pieces = slice(begin, begin + at_once)
            copy_columns(memory, sources[pieces], destinations[pieces])


@dataclass(slots=True)
class ForwardContext:
    """Passed down to the layers. A model knows nothing else of the engine."""

    inputs: StepInputs
    attention: PreparedAttention
    kv: KVCache
    cross: PreparedAttention | None = None
    """In an encoder-decoder: attention of the step's queries to their sources."""
