"""What the attention kernels have in common: where splits begin, and the running softmax of a tile of queries over keys
in blocks. Used by `attention_triton.py`.

Source: Dao et al., "FlashAttention" (2022).
"""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_size(span, min_split, MAX_SPLITS: tl.constexpr):
    """Keys in a split of a sequence of which `span` keys are visible: at least min_split, at most MAX_SPLITS splits."""
    size = min_split
    while size * MAX_SPLITS < span:
        size *= 2
    return size


@triton.jit
def first_visible_key(position, window, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the keys visible from `position` begin, rounded down to a tile."""
    first = position * 0
    if WINDOWED:
        first = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    return first


@triton.jit
def splits_of(first_key, length, min_split, MAX_SPLITS: tl.constexpr, INVARIANT: tl.constexpr):
    """Of a sequence whose visible keys are `first_key .. length`: where split 0 would begin, keys in a split, the first
    split and the one after the last."""
    if INVARIANT:  # the same for every query of a sequence
        base = 0
        size = min_split
        first = first_key // size
    else:
        base = first_key
        size = split_size(length - first_key, min_split, MAX_SPLITS)
        first = first_key * 0
    return base, size, first, tl.cdiv(length - base, size)


@triton.jit
def _attend_tile(
    q, acc, top, total, start, end, position, k_head, v_head, blocks, stride_block, stride_slot,
    window, scale, cap, slope,
    BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Fold keys `start .. start + BLOCK_N` (below `end`) into the running softmax of a tile of queries."""
    key = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    exists = key < end
    # Slots past the end hold anything, NaN included: their block numbers, keys and values are never loaded.
    if MASKED:
        block = tl.load(blocks + key // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    else:
        block = tl.load(blocks + key // BLOCK_SIZE).to(tl.int64)
    place = block * stride_block + (key % BLOCK_SIZE) * stride_slot
    k_at = k_head + place[None, :] + column[:, None]
    v_at = v_head + place[:, None] + column[None, :]
    if MASKED:
        k = tl.load(k_at, mask=exists[None, :] & (column < HEAD_SIZE)[:, None], other=0.0)
        v = tl.load(v_at, mask=exists[:, None] & (column < HEAD_SIZE)[None, :], other=0.0)
    elif BLOCK_D == HEAD_SIZE:
        k = tl.load(k_at)
        v = tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(column < HEAD_SIZE)[:, None], other=0.0)
        v = tl.load(v_at, mask=(column < HEAD_SIZE)[None, :], other=0.0)

    # Scores are in units of log 2, so that the exponential is a single exp2. Keys and values of an FP8 cache become
    # numbers of the queries' type first: sums of FP8 products are too coarse for long contexts.
    if WIDE:  # Triton's interpreter has no product of bf16
        score = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * scale
    else:
        score = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
    if CAPPED:  # `scale` holds 2 log2(e) / cap here: tanh(x) = 1 - 2 / (exp(2x) + 1)
        score = cap * (1 - 2 / (tl.exp2(score) + 1))
    if slope is not None:
        score += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
    if MASKED:
        distance = position[:, None] - key[None, :]
        seen = (distance >= 0) & exists[None, :]
        if WINDOWED:
            seen = seen & (distance < window)
        score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1))
    # A row which has seen no key yet has -inf for its top; any finite number serves, its weights are 0 all the same.
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weight = tl.exp2(score - anchor[:, None])
    fade = tl.exp2(top - anchor)
    total = total * fade + tl.sum(weight, axis=1)
    acc = acc * fade[:, None]
    if WIDE:
        acc = tl.dot(weight, v.to(tl.float32), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def attend(
    q, first_key, end, first_position, position, k_head, v_head, blocks, stride_block, stride_slot,
    window, scale, cap, slope, v_scale,
    BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    INVARIANT: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to keys `first_key .. end`: weighted sum, top score, total weight.

    `slope`: None, or ALiBi's of each row, times log2(e). `v_scale`: None, or that of an FP8 cache's values; that of its
    keys is in `scale`."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    masked_from = first_key
    # Tiles which the first query sees whole need no mask. But which ones these are depends on the queries beside it,
    # and the compiler may round differently where there is no mask between a product and a sum.
    if not WINDOWED and not INVARIANT:
        whole = tl.maximum(tl.minimum(end, first_position + 1) - first_key, 0) // BLOCK_N * BLOCK_N
        masked_from = first_key + whole
        for start in range(first_key, masked_from, BLOCK_N):
            acc, top, total = _attend_tile(
                q, acc, top, total, start, end, position, k_head, v_head, blocks, stride_block, stride_slot,
                window, scale, cap, slope,
                BLOCK_SIZE, HEAD_SIZE, BLOCK_D, BLOCK_N, WINDOWED, CAPPED, False, PRECISION, WIDE,
            )  # fmt: skip
    for start in range(masked_from, end, BLOCK_N):
        acc, top, total = _attend_tile(
            q, acc, top, total, start, end, position, k_head, v_head, blocks, stride_block, stride_slot,
            window, scale, cap, slope,
            BLOCK_SIZE, HEAD_SIZE, BLOCK_D, BLOCK_N, WINDOWED, CAPPED, True, PRECISION, WIDE,
        )  # fmt: skip
    if v_scale is not None:
        acc *= v_scale
    return acc, top, total


@triton.jit
def join_split(acc, top, total, part_acc, part_top, part_total):
    """Add one more split to the sum of those before it. The same operations wherever it stands, to the bit: without
    `fma` the compiler would choose which of the products is rounded."""
    new_top = tl.maximum(top, part_top)
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    fade, weight = tl.exp2(top - anchor), tl.exp2(part_top - anchor)
    total = tl.fma(total, fade, part_total * weight)
    if len(acc.shape) == 2:
        fade, weight = fade[:, None], weight[:, None]
    acc = tl.fma(acc, tl.broadcast_to(fade, acc.shape), part_acc * weight)
    return acc, new_top, total
