"""What one step hands to the model: token ids, positions, and the `ForwardContext` by which layers reach the KV
cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.attention.base import LayerCache, PreparedAttention


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

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them, each `[num_blocks, KH, block_size, D]`."""
        return [cache for layer in self.layers for cache in (layer.keys, layer.values)]

    def copy_blocks(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """Copy whole blocks; all sources are read before any destination is written."""
        for cache in self.tensors:
            plain = cache.view(torch.uint8) if cache.itemsize == 1 else cache  # torch copies no FP8 by index
            plain.index_copy_(0, destinations, plain.index_select(0, sources))


@dataclass(slots=True)
class ForwardContext:
    """Passed down to the layers. A model knows nothing else of the engine."""

    inputs: StepInputs
    attention: PreparedAttention
    kv: KVCache
    cross: PreparedAttention | None = None
    """In an encoder-decoder: attention of the step's queries to their sources."""
