"""The Triton side of `forbid.py`: a row and a tile of its tokens to each program."""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
"""Tokens of a program, 128 words of the mask."""


@triton.jit
def forbid_tokens_kernel(logits, rows, allowed, logits_stride, allowed_stride, vocab, TILE: tl.constexpr):
    entry = tl.program_id(0)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < vocab
    word = tl.load(allowed + entry.to(tl.int64) * allowed_stride + token // 32, mask=inside, other=-1)
    forbidden = ((word >> (token % 32)) & 1) == 0
    row = tl.load(rows + entry)
    tl.store(logits + row * logits_stride + token, float("-inf"), mask=inside & forbidden)


def forbid_tokens_triton(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor) -> None:
    """`forbid.forbid_tokens` without its checks."""
    vocab = logits.shape[1]
    if rows.numel() and vocab:
        forbid_tokens_kernel[rows.numel(), triton.cdiv(vocab, TILE)](
            logits, rows, allowed, logits.stride(0), allowed.stride(0), vocab, TILE=TILE, num_warps=4
        )
