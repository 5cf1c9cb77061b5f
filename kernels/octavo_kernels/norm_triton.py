"""The Triton side of `norm.py`: one program a row, the row held in registers between the two uses."""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels._dispatch import launches_early


@triton.jit
def add_rms_norm_kernel(
    x, residual, weight, normed, hidden,
    x_stride, residual_stride, normed_stride, columns, eps,
    HAS_RESIDUAL: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < columns
    h = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row * residual_stride + column, mask=inside, other=0).to(tl.float32)
        rounded = h.to(hidden.dtype.element_ty)
        tl.store(hidden + row * columns + column, rounded, mask=inside)
        h = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(h * h, axis=0) / columns + eps)
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row * normed_stride + column, (h * factor * scale).to(normed.dtype.element_ty), mask=inside)


def fused_add_rms_norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm.fused_add_rms_norm` without its checks."""
    rows, columns = x.shape
    normed = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if out is None else out
    hidden = x if residual is None else torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    other = x if residual is None else residual
    tile, early = triton.next_power_of_2(columns), launches_early(x.device)
    if rows:
        add_rms_norm_kernel[(rows,)](
            x, other, weight, normed, hidden, x.stride(0), other.stride(0), normed.stride(0), columns, eps,
            HAS_RESIDUAL=residual is not None, TILE=tile, EARLY=early, num_warps=min(16, max(1, tile // 512)),
            launch_pdl=early,
        )  # fmt: skip
    return normed, hidden
