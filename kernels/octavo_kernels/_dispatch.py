"""Which side runs a call: the Triton kernel or its twin. Called first thing by every public operator.

The rule is decided per call from the tensor, never per process, because one process may hold a CPU engine and a GPU
engine. TRITON_INTERPRET=1 sends CPU tensors to the kernels as well; it is read once, since Triton itself decides when a
kernel is decorated whether it is interpreted, and a later change of the variable could only bring the two apart.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAVE_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: torch.Tensor) -> bool:
    """True where the Triton kernel is to run for `tensor`: on a GPU, or on the CPU in Triton's interpreter."""
    return HAVE_TRITON and (tensor.is_cuda or INTERPRETED)


@lru_cache(maxsize=32)
def launches_early(device: torch.device) -> bool:
    """Kernels may begin before the one in front of them in the stream has ended, and wait for it themselves
    (programmatic dependent launch, from compute capability 9.0 on): what they read of weights comes in meanwhile."""
    return device.type == "cuda" and not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
