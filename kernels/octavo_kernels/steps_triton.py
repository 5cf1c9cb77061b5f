"""The Triton side of `steps.py`: programs of 256 entries, which find owners by bisection of `query_start`."""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles


@triton.jit(
    do_not_specialize=["batch", "halvings", "total"],
    do_not_specialize_on_alignment=["rows", "starts", "query_start", "positions"],  # parts of larger tensors
)
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


@triton.jit(do_not_specialize=["count"])
def enter_blocks_kernel(block_table, rows, columns, blocks, count, table_stride, TILE: tl.constexpr):
    update = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = update < count
    row = tl.load(rows + update, mask=inside, other=-1).to(tl.int64)
    real = inside & (row >= 0)
    column = tl.load(columns + update, mask=real, other=0)
    tl.store(block_table + row * table_stride + column, tl.load(blocks + update, mask=real, other=0), mask=real)


def enter_blocks_triton(
    block_table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, blocks: torch.Tensor
) -> None:
    """`steps.enter_blocks` without its checks."""
    count = rows.shape[0]
    if count:
        enter_blocks_kernel[(triton.cdiv(count, tiles.STEP_TILE),)](
            block_table, rows, columns, blocks, count, block_table.stride(0), TILE=tiles.STEP_TILE, num_warps=4
        )


@triton.jit(do_not_specialize=["batch", "halvings"])
def find_broken_kernel(states, query_start, out, batch, halvings, stride, columns, TILE: tl.constexpr):
    """A program a token; those of one sequence that find something all write the same 1."""
    token = tl.program_id(0)
    if token >= tl.load(query_start + batch):
        return
    column = tl.arange(0, TILE)
    value = tl.load(states + token.to(tl.int64) * stride + column, mask=column < columns, other=0).to(tl.float32)
    finite = tl.abs(value) < float("inf")  # not so for NaN
    if tl.min(finite.to(tl.int32), axis=0) == 0:
        low = token * 0
        high = low + batch - 1
        for _ in range(halvings):
            middle = (low + high) // 2
            ended = tl.load(query_start + 1 + middle) <= token
            low = tl.where(ended, tl.minimum(middle + 1, high), low)
            high = tl.where(ended, high, middle)
        tl.store(out + low, 1)


def find_broken_triton(states: torch.Tensor, query_start: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`steps.find_broken` without its checks."""
    tokens, columns = states.shape
    batch = out.shape[0]
    out.zero_()
    if tokens and batch:
        tile = triton.next_power_of_2(columns)
        find_broken_kernel[(tokens,)](
            states, query_start, out, batch, batch.bit_length(), states.stride(0), columns,
            TILE=tile, num_warps=min(8, max(1, tile // 512)),
        )  # fmt: skip
    return out
