"""Attention by the kernels' plain-torch oracle: slow and obviously right, on any device. The tests compare the others
to it."""

from __future__ import annotations

import torch
from octavo_kernels import paged_attention_reference

from octavo.attention.base import AttentionBackend, LayerCache, PreparedAttention
from octavo.execute.context import StepInputs


class ReferenceAttention(AttentionBackend):
    default_block_size = 16

    def prepare(self, inputs: StepInputs) -> PreparedAttention:
        return _Prepared(inputs)


class _Prepared(PreparedAttention):
    def __init__(self, inputs: StepInputs) -> None:
        self.inputs = inputs
        self.block_table = inputs.block_table.index_select(0, inputs.rows)

    def attend(
        self, q: torch.Tensor, cache: LayerCache, *, scale: float, window: int,
        distance_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if distance_bias is not None:
            raise NotImplementedError("a bias by distance")
        step = self.inputs
        return paged_attention_reference(
            q, cache.keys, cache.values, self.block_table, step.query_start, step.seq_lens,
            max_query_len=step.max_query_len, max_seq_len=step.max_seq_len, scale=scale, window=window,
            kv_scales=cache.scales,
        )  # fmt: skip
