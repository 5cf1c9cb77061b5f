"""The rotary frequencies that a configuration asks for. Called once per model, by the rotary embedding layer."""

from __future__ import annotations

import math

import torch

from octavo.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Rotary frequencies, float32 `[head_dim / 2]` in radians a token, and the factor that scales cos and sin.

    The same operations in the same order as transformers' `ROPE_INIT_FUNCTIONS`, so that both give the same bits.
    """
    dim, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    powers = base ** (torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float) / dim)
    inv_freq = 1.0 / powers
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "factors":
        return inv_freq / torch.tensor(scaling.freq_factors, dtype=torch.float), 1.0
    original, factor = scaling.original_max_position, scaling.factor
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        wavelength = 2 * math.pi / inv_freq
        long, short = wavelength > original / low, wavelength < original / high
        scaled = torch.where(long, inv_freq / factor, inv_freq)
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * scaled / factor + smooth * scaled
        return torch.where(~short & ~long, blended, scaled), 1.0

    def turn(rotations: float) -> float:  # the dimension whose wave turns this often over the original context
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    first, last = turn(scaling.beta_fast), turn(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first if last != first else 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return (1.0 / (factor * powers)) * (1 - keep) + inv_freq * keep, _yarn_attention(scaling)


def _yarn_attention(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude()
