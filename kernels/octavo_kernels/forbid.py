"""Forbids the tokens that a grammar does not allow next. Called by the sampler for the rows that have one."""

from __future__ import annotations

import torch

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton

NEVER = float("-inf")


def forbid_tokens(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor) -> None:
    """Set to -inf, in place, each logit whose bit is 0.

    Args:
        logits: `[B, V]` fp32, contiguous.
        rows: `[R]` int64, which row of `logits` each row of `allowed` is for; each once.
        allowed: `[R, ceil(V / 32)]` int32, contiguous; bit `t % 32` of word `t // 32` allows token `t`.

    Raises:
        ValueError: a shape, a dtype or a stride is wrong.
    """
    check.shape("logits", logits, (-1, -1))
    check.dtype("logits", logits, torch.float32)
    check.unit_stride("logits", logits)
    check.vector("rows", rows, rows.numel(), torch.int64)
    check.shape("allowed", allowed, (rows.numel(), -(-logits.shape[1] // 32)))
    check.dtype("allowed", allowed, torch.int32)
    check.unit_stride("allowed", allowed)
    if use_triton(logits):
        from octavo_kernels.forbid_triton import forbid_tokens_triton

        forbid_tokens_triton(logits, rows, allowed)
    else:
        forbid_tokens_reference(logits, rows, allowed)


def forbid_tokens_reference(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor) -> None:
    """The twin of `forbid_tokens`; same arguments, same result. By numpy on the calling thread: torch would wake its
    other threads for it."""
    if logits.device.type != "cpu":
        bit = torch.arange(32, dtype=torch.int32, device=logits.device)
        bits = (allowed[:, :, None] >> bit & 1).flatten(1)[:, : logits.shape[1]]
        logits[rows] = logits[rows].masked_fill(bits == 0, NEVER)
        return
    import numpy as np

    array = logits.numpy()
    for row, words in zip(rows.tolist(), allowed.numpy(), strict=True):
        allows = np.unpackbits(words.view(np.uint8), bitorder="little", count=array.shape[1])
        np.putmask(array[row], allows == 0, NEVER)
