"""The Triton side of `attention.py`: one kernel for prefill and decode, one that joins the splits of decode, and one
for splits that many sequences have in common.

The rows of a tile are query tokens times the query heads of one KV head, so that keys are read once for a whole group.
A sequence takes one of two ways, by its own count of new tokens:

- *short* (up to `tiles.SHORT_QUERY`): its keys fall into splits, each attended to on its own; partial sums go to a
  scratch buffer and `join_splits_kernel` joins them in order. With one split the result is written at once.
- *long*: tiles of its queries walk over all their keys; there are tiles enough to fill the GPU.

Where all sequences of a decoding step begin with the same blocks, the splits in there are attended to by tiles of many
sequences' queries, which read the keys once; sums and order are those of the other way.

A step with both kinds launches both, and each launch passes over the other's sequences. So which way a sequence goes,
its splits and its tiles follow from its own numbers, `min_split` and the chip, and its result is the same in every
batch. How many programs share the splits of a sequence does depend on the batch, as that changes no bit.

On request (`invariant`) both ways give the same, to the bit: tiles are the same, splits begin at multiples of their
size, and a long sequence joins them as it walks along.
"""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles
from octavo_kernels._dispatch import INTERPRETED, launches_early
from octavo_kernels.attention_tile_triton import LOG2E, attend, first_visible_key, join_split, splits_of

NO_LIMIT = 2**31 - 1


# Numbers that change with the batch are not specialised on, nor where small tensors lie, which are parts of larger ones
# as a rule: each new one of them would be compiled for.
@triton.jit(
    do_not_specialize=[
        "batch", "halvings", "tiles_each", "token_slots", "split_slots", "longest_fresh", "min_split", "window",
    ],
    do_not_specialize_on_alignment=["query_start", "seq_lens", "part_total"],
)  # fmt: skip
def paged_attention_kernel(
    q, k_cache, v_cache, block_table, query_start, seq_lens, out, part_acc, part_top, part_total, shared,
    kv_scales, alibi_slopes, batch, halvings, tiles_each, token_slots, split_slots,
    q_stride_token, q_stride_head, out_stride_token, out_stride_head,
    stride_block, stride_head, stride_slot, table_stride, longest_fresh, min_split, window, scale, cap,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHORT: tl.constexpr, SHORT_QUERY: tl.constexpr,
    MAX_SPLITS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr, SHARED: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    if SHORT:
        b = tl.program_id(0) // tiles_each
        tile = tl.program_id(0) % tiles_each
    else:
        # Sequence b owns tiles from query_start[b] // BLOCK_Q + b on: enough for its queries, known without a count.
        low = 0
        high = batch - 1
        for _ in range(halvings):
            middle = (low + high + 1) // 2
            reached = tl.load(query_start + middle) // BLOCK_Q + middle <= tl.program_id(0)
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, tl.maximum(middle - 1, low))
        b = low
        tile = tl.program_id(0) - (tl.load(query_start + b) // BLOCK_Q + b)
    begin = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - begin
    if tile * BLOCK_Q >= count:
        return
    if SHORT:
        if count > SHORT_QUERY:
            return
    else:
        if count <= SHORT_QUERY:
            return
    length = tl.load(seq_lens + b)
    if (count == length) & (count > longest_fresh):
        return
    first_position = length - count + tile * BLOCK_Q
    end = tl.minimum(first_position + BLOCK_Q, length)

    row = tl.arange(0, BLOCK_M)
    token = tile * BLOCK_Q + row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = (row < BLOCK_Q * GROUP) & (token < count)
    position = length - count + token
    column = tl.arange(0, BLOCK_D)
    q_at = q + (begin + token).to(tl.int64)[:, None] * q_stride_token + head[:, None] * q_stride_head + column[None, :]
    kept = live[:, None] & (column < HEAD_SIZE)[None, :]
    queries = tl.load(q_at, mask=kept, other=0)
    k_head = k_cache + kv_head.to(tl.int64) * stride_head
    v_head = v_cache + kv_head.to(tl.int64) * stride_head
    blocks = block_table + b.to(tl.int64) * table_stride
    out_at = out + (begin + token).to(tl.int64)[:, None] * out_stride_token + head[:, None] * out_stride_head
    out_at += column[None, :]
    slope = None
    v_scale = None
    if kv_scales is not None:
        scale *= tl.load(kv_scales + kv_head)
        v_scale = tl.load(kv_scales + tl.num_programs(1) + kv_head)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=live, other=0.0) * LOG2E

    first_key = first_visible_key(first_position, window, BLOCK_N, WINDOWED)
    if SHORT:
        base, size, first_split, end_split = splits_of(first_key, length, min_split, MAX_SPLITS, INVARIANT)
        done = 0
        if SHARED:
            done = tl.load(shared)
        for split in range(first_split + done + tl.program_id(2), end_split, tl.num_programs(2)):
            start = base + split * size
            acc, top, total = attend(
                queries, tl.maximum(start, first_key), tl.minimum(start + size, end), first_position, position,
                k_head, v_head, blocks, stride_block, stride_slot, window, scale, cap, slope, v_scale,
                BLOCK_SIZE, HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWED, CAPPED, PRECISION, WIDE, INVARIANT,
            )  # fmt: skip
            if end_split - first_split == 1:
                result = acc / tl.where(total == 0, 1.0, total)[:, None]
                tl.store(out_at, result.to(out.dtype.element_ty), mask=kept)
            else:
                heads = tl.num_programs(1) * GROUP
                place = ((b * token_slots + token).to(tl.int64) * heads + head) * split_slots + split - first_split
                tl.store(part_acc + place[:, None] * HEAD_SIZE + column[None, :], acc, mask=kept)
                tl.store(part_top + place, top, mask=live)
                tl.store(part_total + place, total, mask=live)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if INVARIANT:
            for split in range(first_key // min_split, tl.cdiv(end, min_split)):
                start = split * min_split
                more, more_top, more_total = attend(
                    queries, tl.maximum(start, first_key), tl.minimum(start + min_split, end), first_position, position,
                    k_head, v_head, blocks, stride_block, stride_slot, window, scale, cap, slope, v_scale,
                    BLOCK_SIZE, HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWED, CAPPED, PRECISION, WIDE, INVARIANT,
                )  # fmt: skip
                acc, top, total = join_split(acc, top, total, more, more_top, more_total)
        else:
            acc, top, total = attend(
                queries, first_key, end, first_position, position,
                k_head, v_head, blocks, stride_block, stride_slot, window, scale, cap, slope, v_scale,
                BLOCK_SIZE, HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, WINDOWED, CAPPED, PRECISION, WIDE, INVARIANT,
            )  # fmt: skip
        result = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=kept)


@triton.jit(
    do_not_specialize=["batch", "split_slots"], do_not_specialize_on_alignment=["query_start", "part_total"]
)
def shared_splits_kernel(
    q, k_cache, v_cache, block_table, query_start, part_acc, part_top, part_total, shared, kv_scales,
    batch, split_slots, q_stride_token, q_stride_head, stride_block, stride_head, stride_slot, scale, cap,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One split, common to all sequences, for a tile of (sequence, query head of a KV head)."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    split = tl.program_id(2)
    if split >= tl.load(shared):
        return
    kv_head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = row // GROUP
    head = kv_head * GROUP + row % GROUP
    token = tl.load(query_start + b, mask=b < batch, other=0)
    live = (b < batch) & (tl.load(query_start + b + 1, mask=b < batch, other=0) > token)
    column = tl.arange(0, BLOCK_D)
    kept = live[:, None] & (column < HEAD_SIZE)[None, :]
    q_at = q + token.to(tl.int64)[:, None] * q_stride_token + head[:, None] * q_stride_head + column[None, :]
    start = split * MIN_SPLIT
    v_scale = None
    if kv_scales is not None:
        scale *= tl.load(kv_scales + kv_head)
        v_scale = tl.load(kv_scales + tl.num_programs(1) + kv_head)
    acc, top, total = attend(
        tl.load(q_at, mask=kept, other=0), start, start + MIN_SPLIT, start + MIN_SPLIT, row * 0 + start + MIN_SPLIT,
        k_cache + kv_head.to(tl.int64) * stride_head, v_cache + kv_head.to(tl.int64) * stride_head, block_table,
        stride_block, stride_slot, 0, scale, cap, None, v_scale,
        BLOCK_SIZE, HEAD_SIZE, BLOCK_D, BLOCK_M, BLOCK_N, False, CAPPED, PRECISION, WIDE, False,
    )  # fmt: skip
    place = (b.to(tl.int64) * tl.num_programs(1) * GROUP + head) * split_slots + split
    tl.store(part_acc + place[:, None] * HEAD_SIZE + column[None, :], acc, mask=kept)
    tl.store(part_top + place, top, mask=live)
    tl.store(part_total + place, total, mask=live)


@triton.jit(
    do_not_specialize=["token_slots", "split_slots", "min_split", "window"],
    do_not_specialize_on_alignment=["query_start", "seq_lens", "part_total"],
)
def join_splits_kernel(
    part_acc, part_top, part_total, query_start, seq_lens, out,
    token_slots, split_slots, out_stride_token, out_stride_head, min_split, window,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SHORT_QUERY: tl.constexpr,
    MAX_SPLITS: tl.constexpr, TOGETHER: tl.constexpr, WINDOWED: tl.constexpr,
    EARLY: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    """Join the splits of one query token and head, in their order: the result does not depend on the batch."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0) // token_slots
    token = tl.program_id(0) % token_slots
    head = tl.program_id(1)
    begin = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - begin
    if (token >= count) | (count > SHORT_QUERY):
        return
    length = tl.load(seq_lens + b)
    first_key = first_visible_key(length - count, window, BLOCK_N, WINDOWED)
    _, _, first_split, end_split = splits_of(first_key, length, min_split, MAX_SPLITS, INVARIANT)
    splits = end_split - first_split
    if splits <= 1:
        return
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head) * split_slots
    column = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if INVARIANT:
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for s in range(0, splits):
            values = tl.load(part_acc + (place + s) * HEAD_SIZE + column, mask=column < HEAD_SIZE, other=0)
            part_tops, part_totals = tl.load(part_top + place + s), tl.load(part_total + place + s)
            acc, top, total = join_split(acc, top, total, values, part_tops, part_totals)
    else:
        split = tl.arange(0, MAX_SPLITS)
        tops = tl.load(part_top + place + split, mask=split < splits, other=float("-inf"))
        totals = tl.load(part_total + place + split, mask=split < splits, other=0)
        anchor = tl.max(tops, axis=0)
        total = tl.sum(tl.exp2(tops - anchor) * totals, axis=0)
        for first in range(0, splits, TOGETHER):
            s = first + tl.arange(0, TOGETHER)
            exists = s < splits
            weight = tl.exp2(tl.load(part_top + place + s, mask=exists, other=float("-inf")) - anchor)
            part = part_acc + (place + s)[:, None] * HEAD_SIZE + column[None, :]
            values = tl.load(part, mask=exists[:, None] & (column < HEAD_SIZE)[None, :], other=0)
            acc += tl.sum(weight[:, None] * values, axis=0)
    out_at = out + (begin + token).to(tl.int64) * out_stride_token + head * out_stride_head + column
    result = acc / tl.where(total == 0, 1.0, total)
    tl.store(out_at, result.to(out.dtype.element_ty), mask=column < HEAD_SIZE)


def _split_slots(max_seq_len: int, window: int, block_n: int, min_split: int, most: int) -> int:
    """The most splits a short sequence of this batch can have. In a window they begin anywhere."""
    splits = triton.cdiv(max_seq_len, min_split)
    if window > 0:
        splits = min(splits, triton.cdiv(window + tiles.SHORT_QUERY + block_n, min_split) + 1)
    return min(most, splits)


def paged_attention_triton(
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
    """`attention.paged_attention` without its checks. Raises `ValueError` for a head size above 256."""
    tokens, heads, head_size = q.shape
    kv_heads, batch, device = k_cache.shape[1], seq_lens.shape[0], q.device
    if head_size > 256:
        raise ValueError(f"q has head size {head_size}; this kernel holds at most 256 in registers")
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if tokens == 0 or batch == 0:
        return out
    early = launches_early(device)
    group, block_d = heads // kv_heads, max(16, triton.next_power_of_2(head_size))
    itemsize, cache_itemsize = q.element_size(), k_cache.element_size()
    whole = max_seq_len <= min_split and window <= 0
    for short in (True, False):
        if not short and max_query_len <= tiles.SHORT_QUERY:
            break
        kind = "long" if invariant or not short else tiles.decoding_kind(batch * kv_heads, whole, cache_itemsize)
        tile = tiles.attention_tiles(tiles.architecture(device), block_d, itemsize, group, kind)
        block_q = tile.block_m // group
        token_slots = min(tiles.SHORT_QUERY, max_query_len)
        tiles_each, split_slots, programs = 1, 1, 1
        if short:
            tiles_each = triton.cdiv(token_slots, block_q)
            most = tiles.MAX_INVARIANT_SPLITS if invariant else tiles.MAX_SPLITS
            split_slots = _split_slots(max_seq_len, window, tile.block_n, min_split, most)
            wanted = tiles.PROGRAMS_PER_SM * tiles.multiprocessors(device)
            programs = min(split_slots, triton.cdiv(wanted, batch * tiles_each * kv_heads))
            grid = (batch * tiles_each, kv_heads, programs)
        else:
            grid = (tokens // block_q + batch, kv_heads, 1)
        part_acc = part_top = part_total = out
        if split_slots > 1:
            rows = batch * token_slots * heads * split_slots
            part_acc = torch.empty(rows, head_size, dtype=torch.float32, device=device)
            part_top, part_total = torch.empty(2, rows, dtype=torch.float32, device=device).unbind(0)
        shares = short and shared_splits is not None and split_slots > 1
        precision = "ieee" if q.dtype == torch.float32 else "tf32"
        factor, cap = LOG2E.value * (2 * scale / soft_cap if soft_cap > 0 else scale), LOG2E.value * soft_cap
        if shares:
            shared_splits_kernel[triton.cdiv(batch * group, tiles.SHARED_ROWS), kv_heads, split_slots](
                q, k_cache, v_cache, block_table, query_start, part_acc, part_top, part_total, shared_splits,
                kv_scales, batch, split_slots, q.stride(0), q.stride(1),
                k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), factor, cap,
                GROUP=group, BLOCK_SIZE=k_cache.shape[2], HEAD_SIZE=head_size, BLOCK_D=block_d,
                BLOCK_M=tiles.SHARED_ROWS, BLOCK_N=tile.block_n, MIN_SPLIT=min_split, CAPPED=soft_cap > 0,
                PRECISION=precision, WIDE=INTERPRETED, EARLY=early, num_warps=4, num_stages=1, launch_pdl=early,
            )  # fmt: skip
        paged_attention_kernel[grid](
            q, k_cache, v_cache, block_table, query_start, seq_lens, out, part_acc, part_top, part_total,
            shared_splits if shares else out, kv_scales, alibi_slopes,
            batch, (batch - 1).bit_length(), tiles_each, token_slots, split_slots,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1),
            k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), block_table.stride(0),
            longest_fresh or NO_LIMIT, min_split, window, factor, cap,
            GROUP=group, BLOCK_SIZE=k_cache.shape[2], HEAD_SIZE=head_size, BLOCK_D=block_d,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SHORT=short, SHORT_QUERY=tiles.SHORT_QUERY,
            MAX_SPLITS=tiles.MAX_SPLITS, WINDOWED=window > 0, CAPPED=soft_cap > 0,
            PRECISION=precision, WIDE=INTERPRETED, EARLY=early, SHARED=shares, INVARIANT=invariant,
            num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=early,
        )  # fmt: skip
        if split_slots > 1:
            join_splits_kernel[batch * token_slots, heads](
                part_acc, part_top, part_total, query_start, seq_lens, out,
                token_slots, split_slots, out.stride(0), out.stride(1), min_split, window,
                HEAD_SIZE=head_size, BLOCK_D=block_d, BLOCK_N=tile.block_n, SHORT_QUERY=tiles.SHORT_QUERY,
                MAX_SPLITS=tiles.MAX_SPLITS, TOGETHER=tiles.JOINED, WINDOWED=window > 0,
                EARLY=early, INVARIANT=invariant, num_warps=tiles.JOIN_WARPS, launch_pdl=early,
            )  # fmt: skip
    return out
