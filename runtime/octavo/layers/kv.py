"""Writing keys and values into the paged cache, for models whose keys do not turn with their position."""

from __future__ import annotations

import torch

from octavo.attention.base import LayerCache


def write_kv(kv: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
    """`kv` `[T, 2 * KH * D]`: keys and values of the tokens that go to `slots` `[T]` int64."""
    _, heads, size, dim = cache.keys.shape
    keys, values = kv.view(len(kv), 2, heads, dim).unbind(1)
    blocks, offsets = slots // size, slots % size
    cache.keys[blocks, :, offsets] = keys
    cache.values[blocks, :, offsets] = values
