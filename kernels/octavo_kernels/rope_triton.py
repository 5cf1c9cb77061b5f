"""The Triton side of `rope.py`: a token and a few of its heads to each program.

A head falls into the first and second half of its rotated part and the rest which passes through, so that a rotation
needs no shuffle: element `i` of one tile turns with element `i` of the other.
"""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles
from octavo_kernels._dispatch import launches_early
from octavo_kernels.rope import FP8_MAX as LARGEST

FP8_MAX = tl.constexpr(LARGEST)


@triton.jit
def _store(value, part, column, inside, is_q, is_k, is_v, q_row, k_row, v_row, inverse):
    """Send a tile of heads to the queries, the key cache or the value cache, whichever each head belongs to. `inverse`:
    None, or what an FP8 cache's keys and values are multiplied with."""
    tl.store(q_row + column, value.to(q_row.dtype.element_ty), mask=inside & is_q)
    if inverse is not None:
        value = tl.clamp(value * inverse, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        part = tl.clamp(part * inverse, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(k_row + column, value.to(k_row.dtype.element_ty), mask=inside & is_k)
    tl.store(v_row + column, part.to(v_row.dtype.element_ty), mask=inside & is_v)


@triton.jit
def rope_and_cache_kernel(
    qkv, cos_sin, positions, slots, k_cache, v_cache, q_norm, k_norm, kv_scales, out,
    qkv_stride, cos_sin_stride, out_stride_token, out_stride_head,
    cache_stride_block, cache_stride_head, cache_stride_slot, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_HALF: tl.constexpr,
    TILE_REST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS))[:, None]
    slot = tl.load(slots + token)
    cached = slot + head * 0 >= 0  # as a column: the interpreter's masks are not made from scalars
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS) & cached
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS) & cached
    live = head < HEADS + 2 * KV_HEADS

    base = qkv + token * qkv_stride + head * HEAD_SIZE
    column = tl.arange(0, TILE_HALF)[None, :]
    turning = column < HALF
    first = tl.load(base + column, mask=live & turning, other=0).to(tl.float32)
    second = tl.load(base + HALF + column, mask=live & turning, other=0).to(tl.float32)
    beyond = 2 * HALF + tl.arange(0, TILE_REST)[None, :]
    passing = beyond < HEAD_SIZE
    rest = tl.load(base + beyond, mask=live & passing, other=0).to(tl.float32)
    first_in, second_in, rest_in = first, second, rest

    if NORM_Q or NORM_K:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
        factor = tl.rsqrt(squares / HEAD_SIZE + eps)[:, None]
        if NORM_Q:
            w1 = tl.load(q_norm + column, mask=turning, other=0).to(tl.float32)
            w2 = tl.load(q_norm + HALF + column, mask=turning, other=0).to(tl.float32)
            w3 = tl.load(q_norm + beyond, mask=passing, other=0).to(tl.float32)
            first = tl.where(is_q, first * factor * w1, first)
            second = tl.where(is_q, second * factor * w2, second)
            rest = tl.where(is_q, rest * factor * w3, rest)
        if NORM_K:
            w1 = tl.load(k_norm + column, mask=turning, other=0).to(tl.float32)
            w2 = tl.load(k_norm + HALF + column, mask=turning, other=0).to(tl.float32)
            w3 = tl.load(k_norm + beyond, mask=passing, other=0).to(tl.float32)
            first = tl.where(is_k, first * factor * w1, first)
            second = tl.where(is_k, second * factor * w2, second)
            rest = tl.where(is_k, rest * factor * w3, rest)

    angle = cos_sin + tl.load(positions + token) * cos_sin_stride + column
    cos = tl.load(angle, mask=turning, other=1)
    sin = tl.load(angle + HALF, mask=turning, other=0)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin

    block = slot // BLOCK_SIZE
    place = block * cache_stride_block + (slot - block * BLOCK_SIZE) * cache_stride_slot
    q_row = out + token * out_stride_token + head * out_stride_head
    k_row = k_cache + place + (head - HEADS) * cache_stride_head
    v_row = v_cache + place + (head - HEADS - KV_HEADS) * cache_stride_head
    inverse = None
    if kv_scales is not None:  # the scales of all keys' heads, then those of all values'
        inverse = tl.div_rn(1.0, tl.load(kv_scales + head - HEADS, mask=is_k | is_v, other=1.0))
    _store(turned_first, first_in, column, turning, is_q, is_k, is_v, q_row, k_row, v_row, inverse)
    _store(turned_second, second_in, HALF + column, turning, is_q, is_k, is_v, q_row, k_row, v_row, inverse)
    if 2 * HALF < HEAD_SIZE:
        _store(rest, rest_in, beyond, passing, is_q, is_k, is_v, q_row, k_row, v_row, inverse)


def rope_and_cache_triton(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    kv_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rope.rope_and_cache` without its checks."""
    tokens, head_size, half = qkv.shape[0], k_cache.shape[3], cos_sin.shape[1] // 2
    if out is None:
        out = torch.empty(tokens, num_heads, head_size, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return out
    early = launches_early(qkv.device)
    tile_half = triton.next_power_of_2(max(1, half))
    tile_heads = max(1, tiles.ROPE_TILE // tile_half)
    rope_and_cache_kernel[tokens, triton.cdiv(num_heads + 2 * num_kv_heads, tile_heads)](
        qkv, cos_sin, positions, slots, k_cache, v_cache,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, kv_scales, out,
        qkv.stride(0), cos_sin.stride(0), out.stride(0), out.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), eps,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_SIZE=head_size, HALF=half, BLOCK_SIZE=k_cache.shape[2],
        NORM_Q=q_norm is not None, NORM_K=k_norm is not None, TILE_HEADS=tile_heads, TILE_HALF=tile_half,
        TILE_REST=triton.next_power_of_2(max(1, head_size - 2 * half)), EARLY=early, num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return out
