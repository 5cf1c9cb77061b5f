"""What a step does with stable rows beside the model: its inputs are built, new blocks are entered, broken sequences
are found. Called by the runtime once a step.

The host sends only row numbers and counts; token ids, positions and cache slots are looked up where they already are.
"""

from __future__ import annotations

import torch

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton

StepInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def step_inputs(
    rows: torch.Tensor,
    starts: torch.Tensor,
    query_start: torch.Tensor,
    tokens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    *,
    total: int,
    out: StepInputs | None = None,
) -> StepInputs:
    """Token ids, positions and KV slots of every token in a step.

    Sequence `b` owns entries `query_start[b] .. query_start[b + 1]` of the step. Its entry `j` is at position
    `p = starts[b] + j`, reads token `tokens[rows[b], p]` and writes its KV to slot
    `block_table[rows[b], p // block_size] * block_size + p % block_size`. Entries from `query_start[B]` on are padding
    (for a captured graph): id 0, position 0, slot -1.

    Args:
        rows: `[B]` int32, the device row of each sequence.
        starts: `[B]` int32, how many tokens of the sequence are computed already.
        query_start: `[B + 1]` int32, running sum of the token counts, beginning with 0.
        tokens: `[R, max_len]` int32, the token ids of every row.
        block_table: `[R, max_blocks]` int32, the KV blocks of every row.
        block_size: tokens in a block.
        total: entries to produce, padding included.
        out: `(input_ids, positions, slots)`, each `[total]` int64, to be written instead of fresh tensors.

    Returns:
        `(input_ids, positions, slots)`, each `[total]` int64.

    Raises:
        ValueError: a shape or a dtype is wrong. Values are not checked on the GPU.
    """
    batch = rows.shape[0]
    check.vector("rows", rows, batch, torch.int32)
    check.vector("starts", starts, batch, torch.int32)
    check.vector("query_start", query_start, batch + 1, torch.int32)
    check.shape("tokens", tokens, (-1, -1))
    check.dtype("tokens", tokens, torch.int32)
    check.unit_stride("tokens", tokens)
    check.shape("block_table", block_table, (-1, -1))
    check.dtype("block_table", block_table, torch.int32)
    check.unit_stride("block_table", block_table)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it counts the tokens of a block and must be at least 1")
    if total < 0:
        raise ValueError(f"total is {total}; it counts the entries of the step and cannot be negative")
    if out is not None:
        for name, tensor in zip(("out[0] (ids)", "out[1] (positions)", "out[2] (slots)"), out, strict=True):
            check.vector(name, tensor, total, torch.int64)
    if use_triton(tokens):
        from octavo_kernels.steps_triton import step_inputs_triton

        return step_inputs_triton(rows, starts, query_start, tokens, block_table, block_size, total=total, out=out)
    return step_inputs_reference(rows, starts, query_start, tokens, block_table, block_size, total=total, out=out)


def step_inputs_reference(
    rows: torch.Tensor,
    starts: torch.Tensor,
    query_start: torch.Tensor,
    tokens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    *,
    total: int,
    out: StepInputs | None = None,
) -> StepInputs:
    """The twin of `step_inputs`; same arguments, same result."""
    batch = rows.shape[0]
    if batch == 0:
        ids, positions, slots = (torch.full((total,), fill, device=tokens.device) for fill in (0, 0, -1))
    else:
        entry = torch.arange(total, device=tokens.device)
        # sequence b ends at query_start[b + 1]: an entry belongs to the first sequence which ends after it
        owner = torch.searchsorted(query_start[1:], entry, right=True, out_int32=False)
        padding = owner == batch
        owner.clamp_(max=batch - 1)
        positions = (entry - query_start[owner] + starts[owner]).masked_fill_(padding, 0)
        row = rows[owner].long()
        ids = tokens[row, positions].long().masked_fill_(padding, 0)
        block = block_table[row, positions // block_size].long()
        slots = (block * block_size + positions % block_size).masked_fill_(padding, -1)
    if out is None:
        return ids, positions, slots
    for target, source in zip(out, (ids, positions, slots), strict=True):
        target.copy_(source)
    return out


def enter_blocks(block_table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, blocks: torch.Tensor) -> None:
    """`block_table[rows[u], columns[u]] = blocks[u]`. Each place at most once; `rows[u] < 0` is padding.

    Args:
        block_table: `[R, max_blocks]` int32.
        rows, columns, blocks: `[U]` int32.

    Raises:
        ValueError: a shape or a dtype is wrong.
    """
    check.dtype("block_table", block_table, torch.int32)
    check.unit_stride("block_table", block_table)
    for name, vector in (("rows", rows), ("columns", columns), ("blocks", blocks)):
        check.vector(name, vector, rows.shape[0], torch.int32)
    if use_triton(block_table):
        from octavo_kernels.steps_triton import enter_blocks_triton

        enter_blocks_triton(block_table, rows, columns, blocks)
    else:
        enter_blocks_reference(block_table, rows, columns, blocks)


def enter_blocks_reference(
    block_table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, blocks: torch.Tensor
) -> None:
    """The twin of `enter_blocks`; same arguments, same result."""
    real = rows >= 0
    block_table[rows[real].long(), columns[real].long()] = blocks[real]


def find_broken(states: torch.Tensor, query_start: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Which sequences have a state that is NaN or infinite: `out[b]` becomes 1, of the others 0.

    Args:
        states: `[T, N]`, fp32, bf16 or fp16. Rows from `query_start[B]` on are padding, whatever they hold.
        query_start: `[B + 1]` int32, running sum of the token counts, beginning with 0.
        out: `[B]` int32, returned.

    Raises:
        ValueError: a shape or a dtype is wrong.
    """
    batch = query_start.shape[0] - 1
    check.shape("states", states, (-1, -1))
    check.dtype("states", states, *check.FLOATS)
    check.unit_stride("states", states)
    check.vector("query_start", query_start, batch + 1, torch.int32)
    check.vector("out", out, batch, torch.int32)
    if use_triton(states):
        from octavo_kernels.steps_triton import find_broken_triton

        return find_broken_triton(states, query_start, out)
    return find_broken_reference(states, query_start, out)


def find_broken_reference(states: torch.Tensor, query_start: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The twin of `find_broken`; same arguments, same result."""
    bad = states.isfinite().all(dim=1).logical_not_()
    before = torch.nn.functional.pad(bad.cumsum(0), (1, 0))[query_start.long()]
    return out.copy_(before[1:] > before[:-1])
