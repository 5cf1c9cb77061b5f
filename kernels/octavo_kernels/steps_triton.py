"""The Triton side of `steps.py`: one program for each 256 entries, which finds owners by bisection of `query_start`."""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles


@triton.jit
def step_inputs_kernel(
    rows, starts, query_start, tokens, block_table, ids, positions, slots,
    batch, halvings, total, tokens_stride, table_stride, block_size,
    TILE: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = entry < total
    low = tl.zeros([TILE], tl.int32)
    high = low + batch
    for _ in range(halvings):
        middle = (low + high) // 2
        open_ = low < high
        ended = open_ & (tl.load(query_start + 1 + middle, mask=open_, other=0) <= entry)
        low = tl.where(ended, middle + 1, low)
        high = tl.where(open_ & ~ended, middle, high)
    real = inside & (low < batch)
    position = entry - tl.load(query_start + low, mask=real, other=0) + tl.load(starts + low, mask=real, other=0)
    row = tl.load(rows + low, mask=real, other=0).to(tl.int64)
    token = tl.load(tokens + row * tokens_stride + position, mask=real, other=0)
    block = tl.load(block_table + row * table_stride + position // block_size, mask=real, other=0).to(tl.int64)
    tl.store(ids + entry, token.to(tl.int64), mask=inside)
    tl.store(positions + entry, tl.where(real, position, 0).to(tl.int64), mask=inside)
    tl.store(slots + entry, tl.where(real, block * block_size + position % block_size, -1), mask=inside)


def step_inputs_triton(
    rows: torch.Tensor,
    starts: torch.Tensor,
    query_start: torch.Tensor,
    tokens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    *,
    total: int,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`steps.step_inputs` without its checks."""
    if out is None:
        ids, positions, slots = torch.empty(3, total, dtype=torch.int64, device=tokens.device).unbind(0)
    else:
        ids, positions, slots = out
    batch = rows.shape[0]
    if total:
        step_inputs_kernel[(triton.cdiv(total, tiles.STEP_TILE),)](
            rows, starts, query_start, tokens, block_table, ids, positions, slots,
            batch, batch.bit_length(), total, tokens.stride(0), block_table.stride(0), block_size,
            TILE=tiles.STEP_TILE, num_warps=4,
        )  # fmt: skip
    return ids, positions, slots
