"""A KV cache of more than 2^31 elements, also where there is not so much memory."""

from __future__ import annotations

import mmap

import torch

MAP_NORESERVE = 0x4000  # Linux's; Python has the name from 3.13 on


def far_cache(device: torch.device, dtype: torch.dtype, block: tuple[int, int, int]) -> torch.Tensor:
    """Keys and values `[blocks, 2, *block]`. Only the blocks that are used hold something, and take memory: on a CPU
    pages are made when they are first touched."""
    size = 2 * block[0] * block[1] * block[2]
    shape = (2**31 // size + 256, 2, *block)
    if device.type == "cuda":
        return torch.empty(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, shape[0] * size * dtype.itemsize, flags=flags), dtype=dtype).view(shape)
