"""The Triton side of `invariant.py`: each program walks along all inputs of its tile of the result, in order.

An element's sum is a chain of the matrix unit's steps of 16 inputs, whatever the tile around it, so tiles may follow
from the number of rows; `cases_layers.py` holds that to the bit.
"""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles
from octavo_kernels._dispatch import INTERPRETED, launches_early


@triton.jit(do_not_specialize=["rows"])
def invariant_linear_kernel(
    x, weight, bias, out, rows, outputs, inputs, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # a few tiles of rows side by side take the same weights, while they are in the cache
    across = tl.cdiv(rows, BLOCK_M)
    group = tl.program_id(0) // (TOGETHER * tl.cdiv(outputs, BLOCK_N))
    together = tl.minimum(across - group * TOGETHER, TOGETHER)
    inside = tl.program_id(0) % (TOGETHER * tl.cdiv(outputs, BLOCK_N))
    m = (group * TOGETHER + inside % together) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = inside // together * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Past the last output its weights are read again, and not stored: no mask in the loop. Not so past the last row: of
    # a step of one token all programs would ask for the same lines 64 times over, and wait for one slice of the cache.
    exists = (m < rows)[:, None]
    x_at = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_at = weight + tl.minimum(n, outputs - 1).to(tl.int64)[None, :] * inputs + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        if EVEN:
            a = tl.load(x_at + start, mask=exists, other=0)
            b = tl.load(w_at + start)
        else:
            a = tl.load(x_at + start, mask=exists & (k < inputs - start)[None, :], other=0)
            b = tl.load(w_at + start, mask=(k < inputs - start)[:, None], other=0)
        if WIDE:  # Triton's interpreter has no product of bf16
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + n, mask=n < outputs, other=0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


def invariant_linear_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`invariant.invariant_linear` without its checks."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    early, processors = launches_early(x.device), tiles.multiprocessors(x.device)
    tile = tiles.invariant_tiles(tiles.architecture(x.device), rows, outputs, x.element_size(), processors)
    invariant_linear_kernel[(triton.cdiv(rows, tile.block_m) * triton.cdiv(outputs, tile.block_n),)](
        x, weight, x if bias is None else bias, out, rows, outputs, inputs, x.stride(0),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, TOGETHER=8,
        EVEN=inputs % tile.block_k == 0, BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", WIDE=INTERPRETED, EARLY=early,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=early,
    )  # fmt: skip
    return out
