"""The Triton side of `gumbel.py`: the best token of each vocabulary tile, then the best tile of each row.

The integers are those of the twin bit for bit; the two logarithms may differ in their last bits.
"""

# mypy: disallow-incomplete-defs=False
# In a kernel only what is fixed at compile time carries a type, so its signature is always half annotated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import gumbel, tiles

A = tl.constexpr(gumbel.A)
B = tl.constexpr(gumbel.B)
C = tl.constexpr(gumbel.C)
M1 = tl.constexpr(gumbel.M1)
M2 = tl.constexpr(gumbel.M2)
UNIT = tl.constexpr(gumbel.UNIT)


@triton.jit
def _mix(word):
    word = (word ^ (word >> 16)) * M1
    word = (word ^ (word >> 13)) * M2
    return word ^ (word >> 16)


@triton.jit
def hash_bits(token, seed, position):
    """31 random bits for each token, int32; see `gumbel.py` for the recipe."""
    low, high, at = seed.to(tl.uint32), (seed >> 32).to(tl.uint32), position.to(tl.uint32)
    k0 = _mix(_mix(_mix(low ^ A) + high) + at)
    k1 = _mix(_mix(_mix(high ^ B) + low) ^ (at * C))
    h = (token.to(tl.uint32) * A) ^ k0
    h = (h ^ (h >> 16)) * M1 + k1
    h = (h ^ (h >> 13)) * M2
    signed = h.to(tl.int32, bitcast=True)
    return (signed ^ (signed >> 16)) & 0x7FFFFFFF


@triton.jit
def log_exponential(bits):
    """log(-log1p(-v)) of the 31 bits. Triton has no log1p: a series below 1/16, where 1 - v would lose digits."""
    v = (bits.to(tl.float32) + 0.5) * UNIT
    series = v * (1 / 8) + 1 / 7
    series = v * series + 1 / 6
    series = v * series + 1 / 5
    series = v * series + 1 / 4
    series = v * series + 1 / 3
    series = v * series + 1 / 2
    series = (v * series + 1) * v
    return tl.log(tl.where(v < 0.0625, series, -tl.log(1 - v)))


@triton.jit(do_not_specialize_on_alignment=["temperature", "seeds", "positions"])  # parts of larger tensors, as a rule
def best_of_tile_kernel(
    logits, temperature, seeds, positions, best_score, best_token, vocab, logits_stride, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < vocab
    score = tl.load(logits + row * logits_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    # NaN becomes the best there is: beside NaN alone, what is behind the vocabulary would be as good as any token
    score = tl.where(score < float("inf"), score, float("inf"))
    heat = tl.load(temperature + row)
    if heat > 0:
        bits = hash_bits(token, tl.load(seeds + row), tl.load(positions + row))
        score = score / heat - log_exponential(bits)
    top, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_score + place, top)
    tl.store(best_token + place, tl.program_id(1) * TILE + index)


@triton.jit
def best_of_row_kernel(best_score, best_token, out, count, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILE)
    score = tl.load(best_score + row * count + tile, mask=tile < count, other=float("-inf"))
    _, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row, tl.load(best_token + row * count + index).to(tl.int64))


def gumbel_sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gumbel.gumbel_sample` without its checks."""
    batch, vocab = logits.shape
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch == 0:
        return out
    count = triton.cdiv(vocab, tiles.SAMPLE_TILE)
    best_score = torch.empty(batch, count, dtype=torch.float32, device=logits.device)
    best_token = torch.empty(batch, count, dtype=torch.int32, device=logits.device)
    best_of_tile_kernel[batch, count](
        logits, temperature, seeds, positions, best_score, best_token, vocab, logits.stride(0),
        TILE=tiles.SAMPLE_TILE, num_warps=4,
    )  # fmt: skip
    best_of_row_kernel[(batch,)](
        best_score, best_token, out, count, TILE=triton.next_power_of_2(count), num_warps=1
    )  # fmt: skip
    return out
