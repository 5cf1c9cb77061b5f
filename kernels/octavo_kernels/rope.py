"""QK-norm, rotary positions and the write into the KV cache, in one pass over the QKV projection.

Called once in each decoder layer, between the QKV projection and the attention.
"""

from __future__ import annotations

import torch

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton


def rope_and_cache(
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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise (optional) and rotate queries and keys, write keys and values to their slots, return the queries.

    Rotation is the half-split kind of GPT-NeoX and Llama: dimension `i` turns with `i + rot_dim / 2`. Dimensions from
    `rot_dim` on pass through (partial rotary). Everything is in fp32 and rounded once, to the dtype of its target.

    Args:
        qkv: `[T, (H + 2 KH) * D]`, fp32, bf16 or fp16: all query heads, all key heads, all value heads.
        cos_sin: `[max_pos, rot_dim]` fp32; the first half of a row holds cosines, the second half sines.
        positions: `[T]` int64, each below `max_pos`.
        slots: `[T]` int64; -1 marks padding, for which nothing is written (its query is still returned).
        k_cache, v_cache: `[num_blocks, KH, block_size, D]`, any float dtype. Written in place.
        num_heads, num_kv_heads: `H` and `KH`.
        q_norm, k_norm: `[D]` weights of a per-head RMS norm before the rotation (Qwen3), or None.
        eps: of that norm.
        out: `[T, H, D]` to receive the queries.

    Returns:
        `[T, H, D]` in the dtype of `qkv`, contiguous unless `out` is not.

    Raises:
        ValueError: a shape, a dtype or a stride is wrong.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
    """
    tokens, head_size = qkv.shape[0], k_cache.shape[-1]
    check.shape("qkv", qkv, (tokens, (num_heads + 2 * num_kv_heads) * head_size))
    check.dtype("qkv", qkv, *check.FLOATS)
    check.unit_stride("qkv", qkv)
    check.shape("k_cache", k_cache, (-1, num_kv_heads, -1, head_size))
    check.unit_stride("k_cache", k_cache)
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype or v_cache.stride() != k_cache.stride():
        raise ValueError("v_cache must have the shape, the dtype and the strides of k_cache")
    check.shape("cos_sin", cos_sin, (-1, -1))
    check.dtype("cos_sin", cos_sin, torch.float32)
    check.unit_stride("cos_sin", cos_sin)
    if cos_sin.shape[1] % 2 or cos_sin.shape[1] > head_size:
        raise ValueError(
            f"cos_sin has {cos_sin.shape[1]} columns; they must be even in number and at most the head size {head_size}"
        )
    check.vector("positions", positions, tokens, torch.int64)
    check.vector("slots", slots, tokens, torch.int64)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check.shape(name, weight, (head_size,))
            check.unit_stride(name, weight)
    if out is not None:
        check.output("out", out, (tokens, num_heads, head_size), qkv.dtype)
    if use_triton(qkv):
        from octavo_kernels.rope_triton import rope_and_cache_triton as run
    else:
        run = rope_and_cache_reference
    return run(
        qkv, cos_sin, positions, slots, k_cache, v_cache, num_heads, num_kv_heads,
        q_norm=q_norm, k_norm=k_norm, eps=eps, out=out,
    )  # fmt: skip


def rope_and_cache_reference(
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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of `rope_and_cache`; same arguments, same result."""
    tokens, head_size, block_size = qkv.shape[0], k_cache.shape[3], k_cache.shape[2]
    heads = qkv.view(tokens, num_heads + 2 * num_kv_heads, head_size)
    # an explicit copy, also of fp32: the rotation below is in place and must not reach the caller's qkv
    rotated = heads[:, : num_heads + num_kv_heads].to(torch.float32, copy=True)
    for part, weight in ((rotated[:, :num_heads], q_norm), (rotated[:, num_heads:], k_norm)):
        if weight is not None:
            part.mul_(part.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight)
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions].unsqueeze(1).split(half, dim=-1)
    first, second = rotated[..., :half], rotated[..., half : 2 * half]
    turned = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)

    keys, values = rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :]
    written = slots >= 0
    if not bool(written.all()):
        keys, values, slots = keys[written], values[written], slots[written]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = keys.to(k_cache.dtype)
    v_cache[block, :, offset] = values.to(v_cache.dtype)
    if out is None:
        out = qkv.new_empty(tokens, num_heads, head_size)
    return out.copy_(rotated[:, :num_heads])
