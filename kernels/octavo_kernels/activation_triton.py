"""The Triton side of `activation.py`: a row and a tile of its columns to each program."""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles
from octavo_kernels._dispatch import launches_early


@triton.jit
def silu_and_mul_kernel(x, out, x_stride, out_stride, columns, TILE: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + row * x_stride + columns + column, mask=inside, other=0).to(tl.float32)
    # rounded before the product, as an unfused model does: the same weights then give the same text
    silu = (gate / (1 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + column, (silu * up).to(out.dtype.element_ty), mask=inside)


def silu_and_mul_triton(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`activation.silu_and_mul` without its checks."""
    rows, columns = x.shape[0], x.shape[1] // 2
    if out is None:
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    early = launches_early(x.device)
    if rows and columns:
        silu_and_mul_kernel[rows, triton.cdiv(columns, tiles.SILU_TILE)](
            x, out, x.stride(0), out.stride(0), columns, TILE=tiles.SILU_TILE, EARLY=early, num_warps=4,
            launch_pdl=early,
        )  # fmt: skip
    return out
