"""Attention biases by distance, as T5 has them and MPNet after it: distances fall into buckets, each with a number for
each head. Half of the buckets have one distance each, the rest are spaced by the logarithm.

Source: Raffel et al., "Exploring the Limits of Transfer Learning" (2020).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def distance_bias(table: torch.Tensor, length: int, max_distance: int) -> torch.Tensor:
    """What a table `[buckets, H]` adds to the scores of queries and keys of one text, `[1, H, length, length]`, in both
    directions: half of the buckets are for keys that come after the query."""
    places = torch.arange(length, device=table.device)
    offsets = places[:, None] - places[None, :]  # query - key
    half = len(table) // 2
    buckets = _buckets(offsets.abs(), half, max_distance) + half * (offsets < 0)
    return F.embedding(buckets, table).permute(2, 0, 1)[None]


def bias_by_distance(table: torch.Tensor, max_distance: int) -> torch.Tensor:
    """What a table `[buckets, H]` adds to the score of a key so many tokens before the query, `[H, max_distance + 1]`;
    the last entry is for all greater distances."""
    distances = torch.arange(max_distance + 1, device=table.device)
    return F.embedding(_buckets(distances, len(table), max_distance), table).T.contiguous()


def _buckets(distance: torch.Tensor, count: int, max_distance: int) -> torch.Tensor:
    exact = count // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
    return torch.where(distance < exact, distance, far)
