"""From the vectors of a text's tokens to one vector, in the ways that sentence-transformers knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo.attention.texts import TextBatch


def pool(hidden: torch.Tensor, batch: TextBatch, modes: Sequence[str]) -> torch.Tensor:
    """`[T, W]` -> `[B, W * len(modes)]`, float32. `modes` are of `models.encoder_config.POOLING_MODES`."""
    hidden = hidden.float()
    return torch.cat([_pool(hidden, batch, mode) for mode in modes], dim=1)


def _pool(hidden: torch.Tensor, batch: TextBatch, mode: str) -> torch.Tensor:
    if mode == "cls":
        return hidden[batch.starts]
    if mode == "lasttoken":
        return hidden[batch.ends - 1]
    if mode == "max":
        lowest = hidden.new_full((batch.count, hidden.shape[1]), float("-inf"))
        return lowest.scatter_reduce_(0, batch.text_of[:, None].expand_as(hidden), hidden, "amax")
    weights = (batch.places + 1).float() if mode == "weightedmean" else torch.ones_like(batch.places).float()
    zeros = hidden.new_zeros(batch.count, hidden.shape[1])
    total = zeros.index_add_(0, batch.text_of, hidden * weights[:, None] if mode == "weightedmean" else hidden)
    weight = weights.new_zeros(batch.count).index_add_(0, batch.text_of, weights)[:, None]
    return total / (weight.sqrt() if mode == "mean_sqrt_len_tokens" else weight)
