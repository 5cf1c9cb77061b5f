"""`Head`: from states to logits, or only to the best of them, of an encoder-decoder whose vocabulary may be larger than
all its layers together."""

from __future__ import annotations

from itertools import pairwise

import torch
from octavo_kernels.cpu.compiler import available

from octavo.execute.rows import BestLogits, best_of
from octavo.layers.byte_linear import byte_product
from octavo.layers.linear import ProductMaker

SPAN = 8192
"""Tokens whose logits are made at once: 4 MB as float32 of 128 rows, which stay in the cache until they were seen."""


class Head:
    """`weight` `[V, hidden]`; `bias` `[V]` or None. Does not keep the weight where it was packed (`copied`)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, make: ProductMaker) -> None:
        self._by_spans = weight.device.type == "cpu" and weight.dtype != torch.float16 and available()
        size = SPAN if self._by_spans else len(weight)
        self._bounds = [*range(0, len(weight), size), len(weight)]
        made = [make(weight[i:j], None if bias is None else bias[i:j]) for i, j in pairwise(self._bounds)]
        self._products = [product for product, _ in made]
        self.copied = all(copied for _, copied in made)
        self._floats = make is byte_product
        """Logits stay float32 as the sums of bytes are: a bfloat16 has too few digits to tell sums of beams apart."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[S, hidden]` -> `[S, V]`."""
        states = self._ready(states)
        parts = [product(states) for product in self._products]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def best(self, states: torch.Tensor, count: int) -> BestLogits:
        """`[S, hidden]` -> the highest `count` of each row."""
        if not self._by_spans:
            return best_of(self.logits(states), count)
        from octavo_kernels.cpu.best import Best

        states = self._ready(states)
        best = Best(len(states), min(count, self._bounds[-1]))
        for product, first in zip(self._products, self._bounds[:-1], strict=True):
            best.see(product(states), first)
        return BestLogits(best.values, best.tokens.long(), best.log_sums())

    def _ready(self, states: torch.Tensor) -> torch.Tensor:
        return states.float() if self._floats else states

