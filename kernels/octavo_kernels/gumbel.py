"""Sampling by the Gumbel-max trick with noise keyed by (seed, position, token). Called once a step by the sampler.

The noise of a token is a pure function of its key, so what a request draws depends neither on its row, nor on its
neighbours in the batch, nor on a preemption in between.

The hash, in 32-bit words (`mix` is the finaliser of MurmurHash3, `^` exclusive or, `>>` logical):

    k0 = mix(mix(mix(lo ^ A) + hi) + position)          one pair of keys for a row
    k1 = mix(mix(mix(hi ^ B) + lo) ^ position * C)
    h  = token * A ^ k0                                 and a few instructions for each token
    h ^= h >> 16;  h = h * M1 + k1
    h ^= h >> 13;  h = h * M2
    h ^= h >> 16 (arithmetic);  bits = h & 0x7fffffff

`k1` enters in the middle of the second mix: without it, rows would be shifted windows of one sequence of 2^32 words.
The last shift is arithmetic because torch has no logical one; it permutes the 31 bits which are kept.
`v = (bits + 1/2) / 2^31` lies in (0, 1); noise is `-log(-log1p(-v))`, that is `-log(-log u)` of `u = 1 - v`. Taking `v`
from the fine end of the floats keeps the upper tail exact to 2^-32 instead of 2^-24, where the rare tokens of a large
vocabulary win.

Quality: `tests/kernels/test_gumbel.py` checks uniformity of every byte, the law of the draws and independence between
neighbouring tokens, positions and seeds. It is no cryptographic generator.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton
from octavo_kernels.cpu.compiler import available

A, B, C = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
M1, M2 = 0x85EBCA6B, 0xC2B2AE35
# The largest float below 2^-31: bits + 1/2 may round up to 2^31, and the product must stay below 1.
UNIT = 2.0**-31 * (1 - 2.0**-24)
# Noise lies in [-2.82, 22.19], so a token this far below the best cannot win whatever both draw.
REACH = 25.5
# Elements worked on at once: the handful of temporaries then stays in the cache of a core.
CHUNK = 1 << 17


def gumbel_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw a token a row from `softmax(logits / temperature)`; the most likely token where the temperature is 0.

    Args:
        logits: `[B, V]`, fp32, bf16 or fp16; -inf excludes a token. Not written to.
        temperature: `[B]` fp32, at least 0.
        seeds: `[B]` int64, one a request; all 64 bits count.
        positions: `[B]` int64, the position of the token to be drawn; its low 32 bits count.
        out: `[B]` int64 to receive the result.

    Returns:
        `[B]` int64 token ids. Among equal scores the lowest id wins. In a row with logits that are NaN or infinite, the
        token of such a one.

    Raises:
        ValueError: a shape, a dtype or a stride is wrong.

    Source: Gumbel (1954); Maddison et al., "A* Sampling" (2014); Appleby, MurmurHash3 (public domain) for `mix`.
    """
    batch = logits.shape[0]
    check.shape("logits", logits, (-1, -1))
    check.dtype("logits", logits, *check.FLOATS)
    check.unit_stride("logits", logits)
    if not 0 < logits.shape[1] < 2**31:
        raise ValueError(f"logits has {logits.shape[1]} columns; a vocabulary has at least one token and under 2^31")
    check.vector("temperature", temperature, batch, torch.float32)
    check.vector("seeds", seeds, batch, torch.int64)
    check.vector("positions", positions, batch, torch.int64)
    if out is not None:
        check.vector("out", out, batch, torch.int64)
    if use_triton(logits):
        from octavo_kernels.gumbel_triton import gumbel_sample_triton

        return gumbel_sample_triton(logits, temperature, seeds, positions, out)
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and available():
        from octavo_kernels.cpu.sampling import gumbel_sample_cpu

        return gumbel_sample_cpu(logits, temperature, seeds, positions, out)
    return gumbel_sample_reference(logits, temperature, seeds, positions, out)


def gumbel_sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of `gumbel_sample`; same arguments, same result. Rows of temperature 0 cost one argmax and no noise."""
    batch, vocab = logits.shape
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    warm = temperature > 0
    hot = warm.nonzero().squeeze(1)
    if hot.numel() < batch:
        cold = (~warm).nonzero().squeeze(1)
        out[cold] = logits[cold].argmax(dim=-1)
    if hot.numel() == 0:
        return out
    k0, k1 = row_keys(seeds[hot], positions[hot])
    step = max(1, CHUNK // vocab)
    for start in range(0, hot.numel(), step):
        part = slice(start, start + step)
        rows = hot[part]
        scores = logits[rows].float().div_(temperature[rows].unsqueeze(1))
        out[rows] = _add_noise(scores, k0[part], k1[part]).argmax(dim=-1)
    return out


def _add_noise(scores: torch.Tensor, k0: torch.Tensor, k1: torch.Tensor) -> torch.Tensor:
    """Add the noise to `scores [R, V]` in place, skipping tokens which cannot win whatever they draw."""
    tokens = _token_words(scores.shape[1], scores.device)
    possible = (scores < scores.amax(dim=-1, keepdim=True) - REACH).logical_not_()  # in a row with NaN, all
    index = possible.nonzero() if 4 * int(possible.count_nonzero()) < scores.numel() else None
    if index is None:
        return scores.sub_(log_exponential(hash_bits(tokens, k0, k1)))
    row, token = index.unbind(1)
    drawn = log_exponential(hash_bits(tokens[token], k0[row, 0], k1[row, 0]))
    kept = scores[row, token].sub_(drawn)
    scores.fill_(-torch.inf)
    scores[row, token] = kept
    return scores


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`k0` and `k1` of the module's docstring, each `[B, 1]` int32, from `[B]` int64 seeds and positions."""
    low, high, position = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF, positions & 0xFFFFFFFF
    k0 = _mix(_mix(_mix(low ^ A) + high) + position)
    k1 = _mix(_mix(_mix(high ^ B) + low) ^ (position * C))
    return _signed(k0).unsqueeze(1), _signed(k1).unsqueeze(1)


def hash_bits(tokens: torch.Tensor, k0: torch.Tensor, k1: torch.Tensor) -> torch.Tensor:
    """31 random bits for each token word (`_token_words`) under the keys of its row; int32, at least 0."""
    h = tokens ^ k0
    shifted = h >> 16
    h ^= shifted.bitwise_and_(0xFFFF)
    torch.add(k1, h, alpha=M1 - 2**32, out=h)
    torch.bitwise_right_shift(h, 13, out=shifted)
    h ^= shifted.bitwise_and_(0x7FFFF)
    h *= M2 - 2**32
    h ^= torch.bitwise_right_shift(h, 16, out=shifted)
    return h.bitwise_and_(0x7FFFFFFF)


def log_exponential(bits: torch.Tensor) -> torch.Tensor:
    """The logarithm of a standard exponential variable made of 31 bits: the Gumbel noise with its sign turned."""
    return bits.to(torch.float32).add_(0.5).mul_(-UNIT).log1p_().neg_().log_()


@lru_cache(maxsize=8)
def _token_words(vocab: int, device: torch.device) -> torch.Tensor:
    """`token * A` as `[V]` int32; the same for all rows and steps, hence kept."""
    return _signed(torch.arange(vocab, device=device) * A)


def _mix(word: torch.Tensor) -> torch.Tensor:
    """The finaliser of MurmurHash3 on int64 tensors of which the low 32 bits count."""
    word = word & 0xFFFFFFFF
    word = ((word ^ (word >> 16)) * M1) & 0xFFFFFFFF
    word = ((word ^ (word >> 13)) * M2) & 0xFFFFFFFF
    return word ^ (word >> 16)


def _signed(word: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of an int64 tensor as int32 of the same pattern."""
    word = word & 0xFFFFFFFF
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
