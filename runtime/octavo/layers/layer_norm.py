"""`Norm`: LayerNorm with weight and bias, of a sum where it stands behind one."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Norm:
    """Calling it gives the norm of a sum, `of` that of one tensor."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.bias = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps

    def __call__(self, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        return self.of(x + added)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)

    def targets(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.weight, f"{name}.bias": self.bias}
