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
    weight = batch.lengths[:, None].float()
    if mode == "weightedmean":
        hidden = hidden * (batch.places + 1)[:, None]
        weight = weight * (weight + 1) / 2
    # not by index_add_: on a GPU it adds in the order in which threads come, and equal texts differ in their last bits
    total = batch.padded(hidden).view(batch.count, batch.longest, -1).sum(dim=1)
    return total / (weight.sqrt() if mode == "mean_sqrt_len_tokens" else weight)
