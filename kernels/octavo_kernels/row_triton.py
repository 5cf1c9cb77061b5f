"""The Triton side of `row.py`: a few outputs to each program, which reads their weights once, whole rows at a time."""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles
from octavo_kernels._dispatch import launches_early


@triton.jit
def _weights(rows, k, exists, INPUTS: tl.constexpr):
    kept = exists[:, None] & (k < INPUTS)[None, :]
    return tl.load(rows + k[None, :], mask=kept, other=0, eviction_policy="evict_first")


@triton.jit
def row_linear_kernel(
    x, weight, bias, norm, residual, out, outputs, eps,
    INPUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = output < outputs
    rows = weight + output.to(tl.int64)[:, None] * INPUTS
    rows_up = rows + outputs.to(tl.int64) * INPUTS
    k = tl.arange(0, BLOCK_K)
    w = _weights(rows, k, exists, INPUTS)
    up = _weights(rows_up, k, exists, INPUTS) if GATED else w
    if EARLY:  # weights are no kernel's result: they are asked for before the row is there
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, INPUTS, BLOCK_K):
        if start > 0:
            k = start + tl.arange(0, BLOCK_K)
            w = _weights(rows, k, exists, INPUTS)
            up = _weights(rows_up, k, exists, INPUTS) if GATED else w
        inside = k < INPUTS
        value = tl.load(x + k, mask=inside, other=0).to(tl.float32)
        if NORM:
            squares += value * value
            value = value * tl.load(norm + k, mask=inside, other=0).to(tl.float32)
        acc += w.to(tl.float32) * value[None, :]
        if GATED:
            acc_up += up.to(tl.float32) * value[None, :]
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)
    y = tl.sum(acc, axis=1) * factor
    if BIAS:
        y += tl.load(bias + output, mask=exists, other=0).to(tl.float32)
    if GATED:
        z = tl.sum(acc_up, axis=1) * factor
        if BIAS:
            z += tl.load(bias + outputs + output, mask=exists, other=0).to(tl.float32)
        y = y / (1 + tl.exp(-y)) * z
    if RESIDUAL:
        y += tl.load(residual + output, mask=exists, other=0).to(tl.float32)
    tl.store(out + output, y.to(out.dtype.element_ty), mask=exists)


def row_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`row.row_linear` without its checks."""
    outputs, inputs = weight.shape
    outputs = outputs // 2 if gated else outputs
    out = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    early = launches_early(x.device)
    tile = tiles.row_tiles(tiles.architecture(x.device), inputs, gated)
    row_linear_kernel[(triton.cdiv(outputs, tile.block_n),)](
        x, weight, x if bias is None else bias, x if norm is None else norm, x if residual is None else residual, out,
        outputs, eps, INPUTS=inputs, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, NORM=norm is not None, GATED=gated,
        BIAS=bias is not None, RESIDUAL=residual is not None, EARLY=early, num_warps=tile.num_warps,
        launch_pdl=early,
    )  # fmt: skip
    return out
