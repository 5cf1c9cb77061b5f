"""Small host lists to the device without waiting for it. Used wherever a step or a new row sends numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on `device`. From pinned memory: a copy from ordinary memory would wait for all that the GPU has
    queued."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
