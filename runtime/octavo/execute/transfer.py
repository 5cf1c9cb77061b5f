"""Small host lists to the device without waiting for it. Used wherever a step or a new row sends numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


def to_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on `device`. From pinned memory: a copy from ordinary memory would wait for all that the GPU has
    queued. By numpy, which takes 0.13 ms for 8000 integers, torch 0.46."""
    return array_to_device(np.array(values, dtype=_NUMPY[dtype]), device)


def array_to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same for an array, of its own type. On the CPU the tensor shares its memory."""
    return tensor_to_device(torch.from_numpy(array), device)


def tensor_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same for a tensor in ordinary memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
