"""Whether a device can go on after an error. Asked by the engine's loop when a step has failed."""

from __future__ import annotations

from collections.abc import Callable

import torch


def is_lost(device: torch.device) -> Callable[[], bool]:
    """A function that says so. On a GPU some errors of a kernel (an address out of range, a failed assertion) end the
    process's context: every later call raises the same error, whatever it is for. Waiting for the device tells
    (CUDA C++ Programming Guide, "Error Checking")."""

    def lost() -> bool:
        if device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
        return False

    return lost
