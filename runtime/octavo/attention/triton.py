"""Attention on a GPU: one Triton kernel family over the block tables, and cuDNN for long prompts that come whole.

An H100 gives 338 TFLOP/s to the Triton kernel on a prompt of 8000 tokens (16 heads of 128), 567 to cuDNN, which knows
no block table: its keys and values are gathered first (25 of 490 us). Which way a sequence goes follows from its own
numbers alone. cuDNN plans for each length, so lengths are rounded up, and all are planned before the first request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from octavo_kernels import paged_attention, tiles
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.attention.base import AttentionBackend, PreparedAttention
from octavo.execute.context import StepInputs

LENGTH_STEP = 256
"""Lengths for cuDNN are multiples of this: a length wastes at most 6 % of its work, and plans are few."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """A long prompt of which nothing was computed before."""

    begin: int
    """Its first token in the step."""
    count: int
    blocks: torch.Tensor
    """Its blocks and null blocks after them, for the length rounded up."""


class TritonAttention(AttentionBackend):
    """`library`: use cuDNN where it is faster (see `plan_long_prompts`)."""

    default_block_size = 16

    def __init__(self, *, library: bool = False) -> None:
        self.library = library
        self.prompt_step = LENGTH_STEP if library else None

    def shared_parts(self, shared: int, longest: int) -> int:
        return shared // tiles.MIN_SPLIT if longest <= tiles.MIN_SPLIT * tiles.MAX_SPLITS else 0

    def prepare(self, inputs: StepInputs) -> PreparedAttention:
        table = inputs.block_table.index_select(0, inputs.rows)
        fresh, begin = [], 0
        for entry, (count, length) in enumerate(zip(inputs.counts, inputs.lengths, strict=True)):
            if self.library and count == length > self.most_recorded:
                blocks = -(-count // LENGTH_STEP) * LENGTH_STEP // inputs.block_size
                fresh.append(Fresh(begin, count, F.pad(table[entry, :blocks], (0, max(0, blocks - table.shape[1])))))
            begin += count
        return _Prepared(inputs, table, fresh, self.most_recorded)


class _Prepared(PreparedAttention):
    def __init__(self, inputs: StepInputs, table: torch.Tensor, fresh: list[Fresh], longest: int) -> None:
        self.inputs, self.table, self.fresh, self.longest = inputs, table, fresh, longest
        few = len(inputs.rows) <= tiles.FEW_SEQUENCES
        self.min_split = tiles.FEW_SPLIT if few else tiles.MIN_SPLIT

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, scale: float, window: int,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        step = self.inputs
        fresh = self.fresh if window <= 0 else []
        if len(fresh) == 1 and fresh[0].count == len(q):  # nothing to put together
            return _whole_prompt(q, k_cache, v_cache, kv_scales, fresh[0].blocks, scale)
        if len(fresh) == len(step.rows):
            out = torch.empty_like(q)
        else:
            out = paged_attention(
                q, k_cache, v_cache, self.table, step.query_start, step.seq_lens, max_query_len=step.max_query_len,
                max_seq_len=step.max_seq_len, scale=scale, window=window, longest_fresh=self.longest if fresh else 0,
                shared_splits=step.shared_parts if window <= 0 else None, min_split=self.min_split,
                kv_scales=kv_scales,
            )  # fmt: skip
        for prompt in fresh:
            here = slice(prompt.begin, prompt.begin + prompt.count)
            out[here] = _whole_prompt(q[here], k_cache, v_cache, kv_scales, prompt.blocks, scale)
        return out


def _whole_prompt(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_scales: torch.Tensor | None,
    blocks: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of `q` [count, H, D] to as many keys. What follows them is behind the causal mask."""
    if kv_scales is None:
        k, v = (cache.index_select(0, blocks).transpose(0, 1).flatten(1, 2)[None] for cache in (k_cache, v_cache))
    else:
        k, v = (_gather_fp8(*part, blocks, q.dtype) for part in zip((k_cache, v_cache), kv_scales, strict=True))
    missing = k.shape[2] - len(q)
    padded = (F.pad(q, (0, 0, 0, 0, 0, missing)) if missing else q).transpose(0, 1)[None]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        out = F.scaled_dot_product_attention(padded, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)[: len(q)]


def _gather_fp8(cache: torch.Tensor, scales: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[1, KH, blocks * slots, D] of `dtype`. Exact where the scales are powers of two, as `fp8_cache` makes them."""
    stored = cache.view(torch.uint8).index_select(0, blocks).view(cache.dtype).transpose(0, 1)
    wide = torch.empty(stored.shape, dtype=dtype, device=stored.device).copy_(stored)  # one pass for type and order
    return wide.mul_(scales[:, None, None, None]).flatten(1, 2)[None]


def plan_long_prompts(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, longest: int
) -> bool:
    """Let cuDNN plan for all prompts up to `longest` tokens that will be its own; False if it does not run here."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        for length in range(TritonAttention.most_recorded + LENGTH_STEP, longest + LENGTH_STEP, LENGTH_STEP):
            q, k = (torch.zeros(1, count, length, head_dim, dtype=dtype, device=device) for count in (heads, kv_heads))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    except RuntimeError:
        return False
    return True
