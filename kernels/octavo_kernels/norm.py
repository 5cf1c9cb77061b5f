"""Residual addition fused with RMS normalisation. Called twice in each decoder layer and once at the end of a model."""

from __future__ import annotations

import torch

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton


def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = x + residual`; returns `(h / rms(h) * weight, h)`.

    The sum is rounded to the dtype of `x` before it is normalised, as it is what the next layer sees; the mean of
    squares and the product with `weight` are in fp32 and rounded once.

    Args:
        x: `[T, N]`, fp32, bf16 or fp16.
        residual: `[T, N]` in the dtype of `x`, or None for none. Not written to.
        weight: `[N]`, any float dtype. Models which scale by `1 + w` add the one when they load.
        eps: added to the mean of squares.
        out: `[T, N]` to receive the first result; it may be `x` when `residual` is given.

    Returns:
        `(normed, new_residual)`, both `[T, N]` in the dtype of `x`. Without a residual the second is `x` itself.

    Raises:
        ValueError: a shape, a dtype or a stride is wrong, or `out` is `x` while `x` is to be returned.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    check.shape("x", x, (-1, -1))
    check.dtype("x", x, *check.FLOATS)
    check.unit_stride("x", x)
    check.shape("weight", weight, (x.shape[1],))
    check.dtype("weight", weight, *check.FLOATS)
    check.unit_stride("weight", weight)
    if residual is not None:
        check.output("residual", residual, tuple(x.shape), x.dtype)
    if out is not None:
        check.output("out", out, tuple(x.shape), x.dtype)
        if residual is None and out is x:
            raise ValueError("out must not be x when residual is None, because x is then returned as the new residual")
    if use_triton(x):
        from octavo_kernels.norm_triton import fused_add_rms_norm_triton

        return fused_add_rms_norm_triton(x, residual, weight, eps, out)
    return fused_add_rms_norm_reference(x, residual, weight, eps, out)


def fused_add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `fused_add_rms_norm`; same arguments, same result."""
    hidden = x if residual is None else x + residual
    wide = hidden.float()
    factor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()
    normed = torch.mul(wide, factor).mul_(weight)
    if out is None:
        return normed.to(x.dtype), hidden
    return out.copy_(normed), hidden
