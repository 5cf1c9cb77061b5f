"""Attention on a GPU: one Triton kernel family over the block tables, and cuDNN for long prompts that come whole.

An H100 gives 338 TFLOP/s to the Triton kernel on a prompt of 8000 tokens (16 heads of 128), 567 to cuDNN, which knows
no block table: its keys and values are gathered first (25 of 490 us). Which way a sequence goes follows from its own
numbers alone. cuDNN plans for each length, so lengths are rounded up, and all are planned before the first request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from octavo_kernels import paged_attention, tiles
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.attention.base import AttentionBackend, LayerCache, PreparedAttention
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
    """`plan`: makes cuDNN ready for prompts up to so many tokens and says whether it can be used where it is faster
    (see `plan_long_prompts`). `invariant_to`: when above 0, what a token gets does not depend on how its sequence is
    cut into steps, nor on its neighbours; for sequences up to this length."""

    default_block_size = 16

    def __init__(
        self, kv_heads: int, *, plan: Callable[[int], bool] = lambda longest: False, invariant_to: int = 0
    ) -> None:
        self.kv_heads, self.invariant, self._plan = kv_heads, invariant_to > 0, plan
        self.library = False
        self.shares_prefixes = not self.invariant
        needed = -(-invariant_to // tiles.MAX_INVARIANT_SPLITS)
        self._one_split = max(tiles.MIN_SPLIT, 1 << (needed - 1).bit_length()) if self.invariant else 0

    def get_ready(self, max_tokens: int) -> None:
        self.library = self._plan(max_tokens)
        self.prompt_step = LENGTH_STEP if self.library else None

    def min_split(self, sequences: int) -> int:
        """Keys in a split, at least: the fewer programs there are without splitting, the smaller."""
        if self.invariant:
            return self._one_split
        if sequences <= tiles.FEW_SEQUENCES:
            return tiles.FEW_SPLIT
        return tiles.MANY_SPLIT if sequences * self.kv_heads >= tiles.MANY_PROGRAMS else tiles.MIN_SPLIT

    def undivided(self, sequences: int) -> int:
        return self.min_split(sequences) if sequences * self.kv_heads >= tiles.MANY_PROGRAMS else 0

    def shared_parts(self, shared: int, longest: int) -> int:
        return shared // tiles.MIN_SPLIT if longest <= tiles.MIN_SPLIT * tiles.MAX_SPLITS else 0

    def prepare(self, inputs: StepInputs) -> PreparedAttention:
        table = inputs.block_table.index_select(0, inputs.rows)
        fresh, begin = [], 0
        for entry, (count, length) in enumerate(zip(inputs.counts, inputs.lengths, strict=True)):
            if self.library and count == length > self.longest_own:
                blocks = -(-count // LENGTH_STEP) * LENGTH_STEP // inputs.block_size
                fresh.append(Fresh(begin, count, F.pad(table[entry, :blocks], (0, max(0, blocks - table.shape[1])))))
            begin += count
        split = self.min_split(len(inputs.rows)) if inputs.shared_parts is None else tiles.MIN_SPLIT
        return _Prepared(inputs, table, fresh, self.longest_own, split, self.invariant)


class _Prepared(PreparedAttention):
    def __init__(
        self, inputs: StepInputs, table: torch.Tensor, fresh: list[Fresh], longest: int, min_split: int,
        invariant: bool,
    ) -> None:  # fmt: skip
        self.inputs, self.table, self.fresh, self.longest = inputs, table, fresh, longest
        self.min_split, self.invariant = min_split, invariant

    def attend(
        self, q: torch.Tensor, cache: LayerCache, *, scale: float, window: int,
        distance_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if distance_bias is not None:
            raise NotImplementedError("a bias by distance")  # refused when an engine starts
        step = self.inputs
        fresh = self.fresh if window <= 0 else []
        if len(fresh) == 1 and fresh[0].count == len(q):  # nothing to put together
            return _whole_prompt(q, cache, fresh[0].blocks, scale)
        if len(fresh) == len(step.rows):
            out = torch.empty_like(q)
        else:
            out = paged_attention(
                q, cache.keys, cache.values, self.table, step.query_start, step.seq_lens,
                max_query_len=step.max_query_len, max_seq_len=step.max_seq_len, scale=scale, window=window,
                longest_fresh=self.longest if fresh else 0, shared_splits=step.shared_parts if window <= 0 else None,
                min_split=self.min_split, kv_scales=cache.scales, invariant=self.invariant,
            )  # fmt: skip
        for prompt in fresh:
            here = slice(prompt.begin, prompt.begin + prompt.count)
            out[here] = _whole_prompt(q[here], cache, prompt.blocks, scale)
        return out


def _whole_prompt(q: torch.Tensor, cache: LayerCache, blocks: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of `q` [count, H, D] to as many keys. What follows them is behind the causal mask."""
    k = _gathered(cache.keys, blocks, None if cache.scales is None else cache.scales[0], q.dtype)
    v = _gathered(cache.values, blocks, None if cache.scales is None else cache.scales[1], q.dtype)
    missing = k.shape[2] - len(q)
    padded = (F.pad(q, (0, 0, 0, 0, 0, missing)) if missing else q).transpose(0, 1)[None]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        out = F.scaled_dot_product_attention(padded, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)[: len(q)]


def _gathered(
    cache: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """[1, KH, tokens, D] what lies in `blocks`, in `dtype`."""
    if scales is None:
        found = cache.index_select(0, blocks)
    else:  # torch picks no FP8 by index
        stored = cache.view(torch.uint8).index_select(0, blocks).view(cache.dtype)
        found = (stored.float() * scales[:, None, None]).to(dtype)
    return found.transpose(0, 1).flatten(1, 2)[None]


def plan_long_prompts(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, longest: int
) -> bool:
    """Let cuDNN plan for all prompts up to `longest` tokens that will be its own; False if it does not run here."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        for length in range(TritonAttention.longest_own + LENGTH_STEP, longest + LENGTH_STEP, LENGTH_STEP):
            q, k = (torch.zeros(1, count, length, head_dim, dtype=dtype, device=device) for count in (heads, kv_heads))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    except RuntimeError:
        return False
    return True
