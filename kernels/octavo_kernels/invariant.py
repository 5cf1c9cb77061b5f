"""A matrix product whose rows do not depend on how many there are: bit for bit what a row gives alone.

Libraries choose another kernel, other tiles or another split of the sum for another number of rows, so that a token
turns where its neighbours change. Called by the linear layers of an engine with `deterministic=True`.

Source: He et al., "Defeating Nondeterminism in LLM Inference" (Thinking Machines, 2025), for why this is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton


def invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`y = x W^T + b`, summed in fp32 in the order of the inputs, rounded once.

    Args:
        x: `[T, K]`, fp32, bf16 or fp16.
        weight: `[N, K]` in the dtype of `x`, contiguous.
        bias: `[N]` in the dtype of `x`.

    Returns:
        `[T, N]` in the dtype of `x`. Row `t` follows from `x[t]` alone, on one kind of GPU.

    Raises:
        ValueError: a shape, a dtype or a stride is wrong.
    """
    check.shape("x", x, (-1, -1))
    check.dtype("x", x, *check.FLOATS)
    check.unit_stride("x", x)
    check.shape("weight", weight, (-1, x.shape[1]))
    check.dtype("weight", weight, x.dtype)
    if not weight.is_contiguous():
        raise ValueError("weight must be contiguous; call .contiguous() first")
    if bias is not None:
        check.vector("bias", bias, weight.shape[0], x.dtype)
    if use_triton(x):
        from octavo_kernels.invariant_triton import invariant_linear_triton as run
    else:
        run = invariant_linear_reference
    return run(x, weight, bias)


def invariant_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of `invariant_linear`; same arguments, same result but for the order of the sum, which is torch's."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
