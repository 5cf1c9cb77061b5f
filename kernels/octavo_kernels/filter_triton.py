"""The Triton side of `filter.py`: no sort, but a search for the threshold, one program a row.

Each pass over the row counts (top-k) or weighs (top-p) the tokens not below three pivots and so cuts the interval
which holds the threshold to a quarter. The first passes place pivots evenly between the values, which is what logits
are spread over; later ones place them evenly between the integers of the same order as the floats, which ends on the
exact threshold whatever the distribution. The search ends early once the interval holds as few tokens as decide it.
Once few thousand tokens are left above the interval's lower end, they are gathered into a scratch row, and the search
goes on there: of a vocabulary of 150,000 a handful of passes see the whole.

Weights are 64-bit integers in units of 2^-44 of the best token's, so that sums are exact and have no order: a row's
result cannot depend on the tile size, and counts and masses never contradict each other.
"""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles

LOG2E = tl.constexpr(1.4426950408889634)
ONE = tl.constexpr(float(2**44))
VALUE_PASSES = tl.constexpr(10)


@triton.jit
def _to_key(value):
    """The int64 whose order is that of the floats."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _to_value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _pivot(low, high, lowest, quarter, by_value):
    """A key strictly between `low` and `high`, `quarter` quarters of the way; needs `high - low > 1`."""
    bottom = tl.maximum(_to_value(low), lowest)
    by_float = _to_key(bottom + (_to_value(high - 1) - bottom) * (quarter * 0.25))
    # the width is halved first: it may reach 2^32, and four of it must not overflow
    key = tl.where(by_value, by_float, low + (high - low) * quarter // 4)
    return tl.minimum(tl.maximum(key, low + 1), high - 1)


@triton.jit
def _extent(row, vocab, TILE: tl.constexpr):
    """The largest value of a row, the smallest finite one and how many are finite."""
    top = tl.full([TILE], float("-inf"), tl.float32)
    lowest = tl.full([TILE], float("inf"), tl.float32)
    finite = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(row + column, mask=column < vocab, other=float("-inf"))
        top = tl.maximum(top, x)
        lowest = tl.minimum(lowest, tl.where(x == float("-inf"), float("inf"), x))
        finite += (x > float("-inf")).to(tl.int32)
    return tl.max(top, axis=0), tl.min(lowest, axis=0), tl.sum(finite, axis=0)


@triton.jit
def _count(row, vocab, p1, p2, p3, TILE: tl.constexpr):
    """How many values are not below each pivot."""
    c1 = tl.zeros([TILE], tl.int32)
    c2 = tl.zeros([TILE], tl.int32)
    c3 = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(row + column, mask=column < vocab, other=float("-inf"))
        c1 += (x >= p1).to(tl.int32)
        c2 += (x >= p2).to(tl.int32)
        c3 += (x >= p3).to(tl.int32)
    return tl.sum(c1, axis=0), tl.sum(c2, axis=0), tl.sum(c3, axis=0)


@triton.jit
def _weigh(row, vocab, top, rate, p1, p2, p3, TILE: tl.constexpr):
    """The count and the mass of the values not below each pivot."""
    c1 = tl.zeros([TILE], tl.int32)
    c2 = tl.zeros([TILE], tl.int32)
    c3 = tl.zeros([TILE], tl.int32)
    m1 = tl.zeros([TILE], tl.int64)
    m2 = tl.zeros([TILE], tl.int64)
    m3 = tl.zeros([TILE], tl.int64)
    for start in range(0, vocab, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(row + column, mask=column < vocab, other=float("-inf"))
        mass = (tl.exp2((x - top) * rate) * ONE).to(tl.int64)
        c1 += (x >= p1).to(tl.int32)
        c2 += (x >= p2).to(tl.int32)
        c3 += (x >= p3).to(tl.int32)
        m1 += tl.where(x >= p1, mass, 0)
        m2 += tl.where(x >= p2, mass, 0)
        m3 += tl.where(x >= p3, mass, 0)
    counts = tl.sum(c1, axis=0), tl.sum(c2, axis=0), tl.sum(c3, axis=0)
    return counts[0], counts[1], counts[2], tl.sum(m1, axis=0), tl.sum(m2, axis=0), tl.sum(m3, axis=0)


@triton.jit
def _search_count(source, size, low, high, count_low, k, lowest, enough, TILE: tl.constexpr):
    """Narrow `low .. high` around the k-th largest value until `enough` values or only those k are not below `low`.

    Throughout, at least `k` values are not below `low` and fewer than `k` not below `high`; all are in `source`.
    """
    step = 0
    while (high - low > 1) & (count_low > tl.maximum(k, enough)):
        by_value = step < VALUE_PASSES
        k1 = _pivot(low, high, lowest, 1, by_value)
        k2 = _pivot(low, high, lowest, 2, by_value)
        k3 = _pivot(low, high, lowest, 3, by_value)
        c1, c2, c3 = _count(source, size, _to_value(k1), _to_value(k2), _to_value(k3), TILE)
        high = tl.where(c1 < k, k1, tl.where(c2 < k, k2, tl.where(c3 < k, k3, high)))
        low = tl.where(c3 >= k, k3, tl.where(c2 >= k, k2, tl.where(c1 >= k, k1, low)))
        count_low = tl.where(c3 >= k, c3, tl.where(c2 >= k, c2, tl.where(c1 >= k, c1, count_low)))
        step += 1
    return low, high, count_low


@triton.jit
def _search_mass(
    source, size, low, high, count_low, count_high, mass_low, mass_high, needed, top, rate, lowest, enough,
    TILE: tl.constexpr,
):  # fmt: skip
    """Narrow `low .. high` around the value at which the mass `needed` is reached, until `enough` values are left.

    Throughout, the values not below `low` weigh at least `needed` and those not below `high` weigh less.
    """
    step = 0
    while (high - low > 1) & (count_low - count_high > 1) & (count_low > enough):
        by_value = step < VALUE_PASSES
        k1 = _pivot(low, high, lowest, 1, by_value)
        k2 = _pivot(low, high, lowest, 2, by_value)
        k3 = _pivot(low, high, lowest, 3, by_value)
        c1, c2, c3, m1, m2, m3 = _weigh(source, size, top, rate, _to_value(k1), _to_value(k2), _to_value(k3), TILE)
        is1, is2, is3 = m1 >= needed, m2 >= needed, m3 >= needed
        count_high = tl.where(is3, count_high, tl.where(is2, c3, tl.where(is1, c2, c1)))
        mass_high = tl.where(is3, mass_high, tl.where(is2, m3, tl.where(is1, m2, m1)))
        high = tl.where(is3, high, tl.where(is2, k3, tl.where(is1, k2, k1)))
        count_low = tl.where(is3, c3, tl.where(is2, c2, tl.where(is1, c1, count_low)))
        mass_low = tl.where(is3, m3, tl.where(is2, m2, tl.where(is1, m1, mass_low)))
        low = tl.where(is3, k3, tl.where(is2, k2, tl.where(is1, k1, low)))
        step += 1
    return low, high, count_low, count_high, mass_low, mass_high


@triton.jit
def _gather(row, vocab, floor, kept, used, TILE: tl.constexpr, KEEP: tl.constexpr):
    """Write the values of a row which are not below `floor`, at most KEEP of them, to `kept`, and fill it with -inf.

    They come in any order, by a counter at `used`: what follows only counts and adds them, exactly.
    """
    tl.store(kept + tl.arange(0, KEEP), float("-inf"))
    tl.store(used, 0)
    tl.debug_barrier()
    for start in range(0, vocab, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(row + column, mask=column < vocab, other=float("-inf"))
        wanted = x >= floor
        place = tl.atomic_add(used + tl.zeros([TILE], tl.int32), 1, mask=wanted, sem="relaxed", scope="cta")
        tl.store(kept + place, x, mask=wanted)
    tl.debug_barrier()  # what one thread has written, others are about to read


@triton.jit
def filter_kernel(
    logits, temperature, top_k, top_p, min_p, scratch, counters, vocab, stride, TILE: tl.constexpr, KEEP: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    kept = scratch + index * KEEP
    used = counters + index
    heat = tl.load(temperature + index)
    k = tl.load(top_k + index)
    p = tl.load(top_p + index)
    share = tl.load(min_p + index)
    limited = (k > 0) & (k < vocab)
    if (heat <= 0) | ((limited == 0) & (p >= 1) & (share <= 0)):
        return
    top, lowest, finite = _extent(row, vocab, TILE)
    if finite == 0:
        return

    threshold = tl.maximum(lowest, top + heat * tl.log(share))
    gathered = finite < 0  # whether all that may stay is in `kept`
    if limited & (k < finite):
        low, high, count = _search_count(
            row, vocab, _to_key(lowest), _to_key(top) + 1, finite, k, lowest, KEEP, TILE
        )  # fmt: skip
        if (count <= KEEP) & ((p < 1) | (count > k)):
            _gather(row, vocab, _to_value(low), kept, used, TILE, KEEP)
            gathered = finite > 0
            low, high, count = _search_count(kept, KEEP, low, high, count, k, lowest, 0, KEEP)
        threshold = tl.maximum(threshold, _to_value(low))

    ties = vocab  # how many tokens equal to the threshold stay
    equal = 0
    if p < 1:
        rate = LOG2E / heat
        high = _to_key(top) + 1
        low = _to_key(threshold)
        floor = _to_value(low)
        count_high = 0
        mass_high = tl.zeros([], tl.int64)
        if gathered:
            count_low, _a, _b, mass_low, _c, _d = _weigh(kept, KEEP, top, rate, floor, floor, floor, KEEP)
        else:
            count_low, _a, _b, mass_low, _c, _d = _weigh(row, vocab, top, rate, floor, floor, floor, TILE)
        needed = tl.ceil(p.to(tl.float64) * mass_low.to(tl.float64)).to(tl.int64)
        needed = tl.minimum(tl.maximum(needed, 1), mass_low)
        if gathered == 0:
            low, high, count_low, count_high, mass_low, mass_high = _search_mass(
                row, vocab, low, high, count_low, count_high, mass_low, mass_high, needed, top, rate, lowest, KEEP, TILE
            )  # fmt: skip
            if count_low <= KEEP:
                _gather(row, vocab, _to_value(low), kept, used, TILE, KEEP)
        # where more than KEEP are left although the search is over, they are of one value and this one has no step
        low, high, count_low, count_high, mass_low, mass_high = _search_mass(
            kept, KEEP, low, high, count_low, count_high, mass_low, mass_high, needed, top, rate, lowest, 0, KEEP
        )  # fmt: skip
        threshold = _to_value(low)
        equal = count_low - count_high  # all of one value and weight, or a single token
        weight = (mass_low - mass_high) // equal
        ties = ((needed - mass_high + weight - 1) // weight).to(tl.int32)

    trim = equal > ties
    seen = 0
    for start in range(0, vocab, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < vocab
        x = tl.load(row + column, mask=inside, other=float("-inf"))
        drop = x < threshold
        if trim:
            same = (x == threshold).to(tl.int32)
            drop = drop | ((same > 0) & (seen + tl.cumsum(same, axis=0) > ties))
            seen += tl.sum(same, axis=0)
        tl.store(row + column, float("-inf"), mask=inside & drop)


def top_k_top_p_min_p_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> None:
    """`filter.top_k_top_p_min_p` without its checks."""
    batch, vocab = logits.shape
    if batch:
        keep = min(tiles.FILTER_KEEP, triton.next_power_of_2(vocab))
        scratch = torch.empty(batch, keep, dtype=torch.float32, device=logits.device)
        counters = torch.empty(batch, dtype=torch.int32, device=logits.device)
        filter_kernel[(batch,)](
            logits, temperature, top_k, top_p, min_p, scratch, counters, vocab, logits.stride(0),
            TILE=min(tiles.FILTER_TILE, triton.next_power_of_2(vocab)), KEEP=keep, num_warps=tiles.FILTER_WARPS,
        )  # fmt: skip
