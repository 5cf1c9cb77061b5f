"""Attention over a paged KV cache, for prefill and decode alike. Called once in each layer by an attention back end."""

from __future__ import annotations

import torch

from octavo_kernels import _checks as check
from octavo_kernels import tiles
from octavo_kernels._dispatch import use_triton


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    longest_fresh: int = 0,
    shared_splits: torch.Tensor | None = None,
    min_split: int = tiles.MIN_SPLIT,
    kv_scales: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    invariant: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of new tokens to all tokens of their own sequence, whose KV is in the cache already.

    Sequence `b` brings `n = query_start[b + 1] - query_start[b]` queries; query `i` is at position
    `seq_lens[b] - n + i` and sees keys up to that position. `n` may be 0. What a sequence gets depends on its own
    numbers and `min_split` only, bit for bit: not on its neighbours, nor on `max_query_len` and `max_seq_len`, which
    are upper bounds.

    Args:
        q: `[T, H, D]`, fp32, bf16 or fp16.
        k_cache, v_cache: `[num_blocks, KH, block_size, D]`; `KH` divides `H`; in the dtype of `q`, or float8_e4m3fn.
            Slots past a sequence's end are not read.
        block_table: `[B, max_blocks]` int32, the blocks of each sequence.
        query_start: `[B + 1]` int32, running sum of the query counts, beginning with 0.
        seq_lens: `[B]` int32, tokens of each sequence in the cache, the new ones included.
        max_query_len: at least the largest query count, at most `T`; known on the host, so that no one waits.
        max_seq_len: at least the largest of `seq_lens`.
        scale: factor on `q . k`, as a rule `D ** -0.5`.
        window: when above 0, only keys with `position(q) - position(k) < window` are seen.
        soft_cap: when above 0, scores become `soft_cap * tanh(score / soft_cap)` before the mask.
        longest_fresh: when above 0, sequences of more new tokens than this and no others are left out: the caller has a
            faster way for them.
        shared_splits: `[1]` int32 on the device: the first so many times `min_split` keys lie in the same blocks for
            all sequences, each of which has one query and at most `min_split * tiles.MAX_SPLITS` tokens. Makes it
            faster and changes no bit. Not with a window.
        min_split: keys that a single query attends to one after the other, at least; a power of two. Fewer are faster
            where few sequences are there.
        kv_scales: `[2, KH]` fp32, for caches of float8_e4m3fn: what their keys and values are to be multiplied with.
        alibi_slopes: `[H]` fp32: `slope * (position(k) - position(q))` is added to a head's scores, after the soft cap
            and before the mask. Not with `shared_splits`.
        invariant: what a query gets depends on itself, the keys that it sees and `min_split` only, bit for bit: not on
            how many new tokens its sequence brings. For up to `min_split * tiles.MAX_INVARIANT_SPLITS` tokens each.
            Slower; not with `shared_splits`.
        out: `[T, H, D]` to receive the result.

    Returns:
        `[T, H, D]` in the dtype of `q`. Rows of no sequence (padding past `query_start[B]`) are left as they are; in a
        fresh result their content is unspecified.

    Raises:
        ValueError: a shape, a dtype or a stride is wrong, or a bound is not positive.

    Source: Dao et al., "FlashAttention" (2022) and "Flash-Decoding" (2023); Kwon et al., "PagedAttention" (2023);
    Press et al., "Train Short, Test Long" (ALiBi, 2022).
    """
    tokens, heads, head_size = q.shape
    batch, kv_heads = seq_lens.shape[0], k_cache.shape[1]
    check.dtype("q", q, *check.FLOATS)
    check.unit_stride("q", q)
    check.shape("k_cache", k_cache, (-1, -1, -1, head_size))
    check.unit_stride("k_cache", k_cache)
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype or v_cache.stride() != k_cache.stride():
        raise ValueError("v_cache must have the shape, the dtype and the strides of k_cache")
    check.kv_scales(kv_scales, k_cache)
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k_cache {kv_heads}; the second must divide the first")
    check.shape("block_table", block_table, (batch, -1))
    check.dtype("block_table", block_table, torch.int32)
    check.unit_stride("block_table", block_table)
    check.vector("query_start", query_start, batch + 1, torch.int32)
    check.vector("seq_lens", seq_lens, batch, torch.int32)
    if max_query_len < 1 or max_seq_len < 1:
        raise ValueError(f"max_query_len and max_seq_len must be at least 1; got {max_query_len} and {max_seq_len}")
    if window < 0 or soft_cap < 0:
        raise ValueError(f"window and soft_cap are off at 0 and never negative; got {window} and {soft_cap}")
    if shared_splits is not None:
        check.vector("shared_splits", shared_splits, 1, torch.int32)
        if window > 0 or max_query_len > 1 or alibi_slopes is not None:
            raise ValueError("shared_splits is for decoding without a window and without ALiBi")
    most = tiles.MAX_INVARIANT_SPLITS
    if invariant and (shared_splits is not None or max_seq_len > min_split * most):
        raise ValueError(f"invariant is for up to {most} splits of min_split keys, without shared_splits")
    if alibi_slopes is not None:
        check.vector("alibi_slopes", alibi_slopes, heads, torch.float32)
    if out is not None:
        check.output("out", out, (tokens, heads, head_size), q.dtype)
    if use_triton(q):
        from octavo_kernels.attention_triton import paged_attention_triton as run
    else:
        run = paged_attention_reference
    return run(
        q, k_cache, v_cache, block_table, query_start, seq_lens,
        max_query_len=max_query_len, max_seq_len=max_seq_len, scale=scale, window=window, soft_cap=soft_cap,
        longest_fresh=longest_fresh, shared_splits=shared_splits, min_split=min_split,
        kv_scales=kv_scales, alibi_slopes=alibi_slopes, invariant=invariant, out=out,
    )  # fmt: skip


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    longest_fresh: int = 0,
    shared_splits: torch.Tensor | None = None,
    min_split: int = tiles.MIN_SPLIT,
    kv_scales: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    invariant: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of `paged_attention`; same arguments, same result. One sequence at a time, in fp32: made to be right."""
    block_size, group = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    if out is None:
        out = torch.zeros_like(q)
    bounds, lengths = query_start.tolist(), seq_lens.tolist()
    for b, length in enumerate(lengths):
        begin, end = bounds[b], bounds[b + 1]
        if begin == end or (longest_fresh and end - begin == length > longest_fresh):
            continue
        blocks = block_table[b, : -(-length // block_size)].long()
        keys, values = _gather(k_cache, blocks, length), _gather(v_cache, blocks, length)
        if kv_scales is not None:
            keys, values = keys * kv_scales[0][:, None, None], values * kv_scales[1][:, None, None]
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
        scores = torch.einsum("qhd,hkd->hqk", q[begin:end].float(), keys) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(length, device=q.device)
        distance = position[length - (end - begin) :, None] - position[None, :]
        if alibi_slopes is not None:
            scores -= alibi_slopes[:, None, None] * distance
        hidden = (distance < 0) | (distance >= window) if window > 0 else distance < 0
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
        out[begin:end] = torch.einsum("hqk,hkd->qhd", weights, values).to(q.dtype)
    return out


def _gather(cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` cached vectors of a sequence, `[KH, length, D]` fp32."""
    return cache[blocks].float().transpose(0, 1).flatten(1, 2)[:, :length]
