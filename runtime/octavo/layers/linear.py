"""Linear layers. `Linear` owns one weight, which may hold several of the checkpoint's matrices one under the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Linear:
    """y = x W^T + b, with W `[sum(parts), inputs]`. `parts` are the output sizes of the matrices fused into it."""

    def __init__(
        self, inputs: int, parts: tuple[int, ...], *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.parts = parts
        self.weight = torch.empty(sum(parts), inputs, dtype=dtype, device=device)
        self.bias = torch.empty(sum(parts), dtype=dtype, device=device) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def targets(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Where each matrix of the checkpoint goes: a view of the weight (and of the bias) by checkpoint name."""
        parts = torch.split(self.weight, list(self.parts))
        found = {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
        if self.bias is not None:
            parts = torch.split(self.bias, list(self.parts))
            found |= {f"{name}.bias": part for name, part in zip(names, parts, strict=True)}
        return found
