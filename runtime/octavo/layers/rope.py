"""The table of rotary position embeddings (arXiv 2104.09864), made once when a model is loaded."""

from __future__ import annotations

import torch

from octavo.models.config import ModelConfig
from octavo.models.rope_frequencies import inverse_frequencies


def cos_sin_table(config: ModelConfig, length: int, device: torch.device) -> torch.Tensor:
    """[length, D] float32: cosines of D/2 frequencies, then sines, for positions 0..length-1."""
    frequencies, attention_factor = inverse_frequencies(config)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies.float())
    return (torch.cat([angles.cos(), angles.sin()], dim=1) * attention_factor).to(device)
