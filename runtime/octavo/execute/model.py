"""What a model offers to those who run it: the runner, and the graphs that record it."""

from __future__ import annotations

from typing import Protocol

import torch

from octavo.execute.context import ForwardContext


class Model(Protocol):
    def forward(self, context: ForwardContext) -> torch.Tensor:
        """Final hidden states [T, hidden], normed."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] -> [S, V]."""
