"""The gated activation of a SwiGLU MLP. Called once in each decoder layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton


def silu_and_mul(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(x[:, :N]) * x[:, N:]`, the silu rounded to the dtype of `x` as in an unfused model.

    Args:
        x: `[T, 2N]`, fp32, bf16 or fp16: the gate projection and then the up projection.
        out: `[T, N]` to receive the result.

    Returns:
        `[T, N]` in the dtype of `x`.

    Raises:
        ValueError: a shape, a dtype or a stride is wrong.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    check.shape("x", x, (-1, -1))
    check.dtype("x", x, *check.FLOATS)
    check.unit_stride("x", x)
    if x.shape[1] % 2:
        raise ValueError(f"x has {x.shape[1]} columns; it holds a gate and an up projection, so their count is even")
    if out is not None:
        check.output("out", out, (x.shape[0], x.shape[1] // 2), x.dtype)
    if use_triton(x):
        from octavo_kernels.activation_triton import silu_and_mul_triton

        return silu_and_mul_triton(x, out)
    return silu_and_mul_reference(x, out)


def silu_and_mul_reference(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of `silu_and_mul`; same arguments, same result."""
    gate, up = x.chunk(2, dim=-1)
    if out is None:
        return F.silu(gate).mul_(up)
    return torch.mul(F.silu(gate), up, out=out)
