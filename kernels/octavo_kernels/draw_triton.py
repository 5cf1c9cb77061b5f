"""The Triton side of `draw.py`: the best token of each vocabulary tile, then the best tile of each row, which notes it.

The noise is that of `gumbel_triton.py`.
"""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import tiles
from octavo_kernels.gumbel_triton import hash_bits, log_exponential


@triton.jit
def best_in_tile_kernel(
    logits, rows, positions, temperature, seeds, best_score, best_token, vocab, logits_stride, temperature_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry).to(tl.int64)
    if row < 0:
        return
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < vocab
    score = tl.load(logits + entry * logits_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    # NaN and infinity become the best there is, so that the row's end sees them
    score = tl.where(score < float("inf"), score, float("inf"))
    heat = tl.load(temperature + row * temperature_stride)
    if heat > 0:
        bits = hash_bits(token, tl.load(seeds + row), tl.load(positions + entry))
        score = score / heat - log_exponential(bits)
    top, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    place = entry * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_score + place, top)
    tl.store(best_token + place, tl.program_id(1) * TILE + index)


@triton.jit
def note_best_kernel(
    best_score, best_token, rows, positions, tokens, out, count, tokens_stride, TILE: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry).to(tl.int64)
    if row < 0:
        tl.store(out + entry, -1)
        return
    tile = tl.arange(0, TILE)
    score = tl.load(best_score + entry * count + tile, mask=tile < count, other=float("-inf"))
    best, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(best_token + entry * count + index)
    token = tl.where((best > float("-inf")) & (best < float("inf")), token, -1)
    tl.store(out + entry, token)
    tl.store(tokens + row * tokens_stride + tl.load(positions + entry), tl.maximum(token, 0))


def draw_tokens_triton(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    tokens: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`draw.draw_tokens` without its checks."""
    size, vocab = logits.shape
    if out is None:
        out = torch.empty(size, dtype=torch.int32, device=logits.device)
    if size == 0:
        return out
    count = triton.cdiv(vocab, tiles.SAMPLE_TILE)
    best_score = torch.empty(size, count, dtype=torch.float32, device=logits.device)
    best_token = torch.empty(size, count, dtype=torch.int32, device=logits.device)
    best_in_tile_kernel[size, count](
        logits, rows, positions, temperature, seeds, best_score, best_token, vocab, logits.stride(0),
        temperature.stride(0), TILE=tiles.SAMPLE_TILE, num_warps=4,
    )  # fmt: skip
    note_best_kernel[(size,)](
        best_score, best_token, rows, positions, tokens, out, count, tokens.stride(0),
        TILE=triton.next_power_of_2(count), num_warps=1,
    )  # fmt: skip
    return out
