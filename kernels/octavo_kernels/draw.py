"""Draw the tokens of a step and note them in the device rows. Called once a step, as part of a captured graph.

What `gumbel_sample` does for vectors of parameters, this does for rows of the runtime's table, without a host in
between: parameters are looked up by row, and the token is written where the next step reads it.
"""

from __future__ import annotations

import torch

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton
from octavo_kernels.gumbel import gumbel_sample_reference


def draw_tokens(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    tokens: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw from `softmax(logits[i] / temperature[rows[i]])` with the noise of `gumbel_sample`, and write the token to
    `tokens[rows[i], positions[i]]`.

    Args:
        logits: `[S, V]`, fp32, bf16 or fp16. Not written to.
        rows: `[S]` int32; -1 is padding: nothing is written to `tokens`.
        positions: `[S]` int32, the position of the token to be drawn.
        temperature: `[R]` fp32 of any stride, at least 0.
        seeds: `[R]` int64.
        tokens: `[R, max_len]` int32.
        out: `[S]` int32 to receive the result.

    Returns:
        `[S]` int32 token ids; -1 for padding, and where a logit is NaN or +inf or none is finite (0 is then noted).

    Raises:
        ValueError: a shape, a dtype or a stride is wrong.
    """
    size, table = logits.shape[0], tokens.shape[0]
    check.shape("logits", logits, (-1, -1))
    check.dtype("logits", logits, *check.FLOATS)
    check.unit_stride("logits", logits)
    check.vector("rows", rows, size, torch.int32)
    check.vector("positions", positions, size, torch.int32)
    check.shape("temperature", temperature, (table,))
    check.dtype("temperature", temperature, torch.float32)
    check.vector("seeds", seeds, table, torch.int64)
    check.dtype("tokens", tokens, torch.int32)
    check.unit_stride("tokens", tokens)
    if out is not None:
        check.vector("out", out, size, torch.int32)
    if use_triton(logits):
        from octavo_kernels.draw_triton import draw_tokens_triton

        return draw_tokens_triton(logits, rows, positions, temperature, seeds, tokens, out)
    return draw_tokens_reference(logits, rows, positions, temperature, seeds, tokens, out)


def draw_tokens_reference(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    tokens: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of `draw_tokens`; same arguments, same result."""
    real = rows >= 0
    row, position = rows.clamp_min(0).long(), positions.long()
    drawn = gumbel_sample_reference(logits, temperature[row], seeds[row], position)
    best = logits.float().amax(dim=1)  # NaN if any is
    drawn = torch.where(real & best.isfinite(), drawn, -1).to(torch.int32)
    tokens[row[real], position[real]] = drawn[real].clamp_min(0)
    return drawn if out is None else out.copy_(drawn)
