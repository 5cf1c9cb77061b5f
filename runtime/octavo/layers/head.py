"""From states to logits, or only to the best of them, in encoder-decoders: there the vocabulary may be larger than all
layers together."""

from __future__ import annotations

from itertools import pairwise

import torch
from octavo_kernels.cpu.compiler import available

from octavo.execute.rows import BestLogits, best_of
from octavo.layers.byte_linear import ByteWeight, byte_product
from octavo.layers.linear import ProductMaker

SPAN = 8192
"""Tokens whose logits are made at once: 4 MB as float32 of 128 rows, which stay in the cache until they were seen. 4096
to 16384 are level."""


class Head:
    """`weight` `[V, hidden]`; `bias` `[V]` or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, make: ProductMaker) -> None:
        self._by_spans = weight.device.type == "cpu" and weight.dtype != torch.float16 and available()
        size = SPAN if self._by_spans else len(weight)
        self._bounds = [*range(0, len(weight), size), len(weight)]
        made = [make(weight[i:j], None if bias is None else bias[i:j]) for i, j in pairwise(self._bounds)]
        self._products = [product for product, _ in made]
        self.copied = all(copied for _, copied in made)
        """The weight is not read again."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[S, hidden]` -> `[S, V]`."""
        parts = [product(states) for product in self._products]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def best(self, states: torch.Tensor, count: int) -> BestLogits:
        """`[S, hidden]` -> the highest `count` of each row."""
        if not self._by_spans:
            return best_of(self.logits(states), count)
        from octavo_kernels.cpu.best import Best

        best = Best(len(states), min(count, self._bounds[-1]))
        for product, first in zip(self._products, self._bounds[:-1], strict=True):
            best.see(product(states), first)
        return BestLogits(best.values, best.tokens.long(), best.log_sums())


class ByteHead:
    """The same with weights of 8 bits. Logits are float32, as the sums of bytes are: a bfloat16 has too few digits to
    tell beams apart."""

    copied = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._bounds = [*range(0, len(weight), SPAN), len(weight)]
        self._parts = [ByteWeight(weight[i:j]) for i, j in pairwise(self._bounds)]
        self._bias = None if bias is None else bias.float()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        from octavo_kernels.cpu.byte_rows import quantise_rows, scale_rows

        rows, factors = quantise_rows(states.contiguous())
        sums = torch.cat([part.sums(rows) for part in self._parts], dim=1)
        return scale_rows(sums, factors, self._bias, torch.float32)

    def best(self, states: torch.Tensor, count: int) -> BestLogits:
        from octavo_kernels.cpu.best import Best
        from octavo_kernels.cpu.byte_rows import quantise_rows

        if self._bias is not None:
            return best_of(self.logits(states), count)
        rows, factors = quantise_rows(states.contiguous())
        best = Best(len(states), min(count, self._bounds[-1]))
        for part, first in zip(self._parts, self._bounds[:-1], strict=True):
            best.see(part.sums(rows), first, factors)
        return BestLogits(best.values, best.tokens.long(), best.log_sums())


def head_of(weight: torch.Tensor, bias: torch.Tensor | None, make: ProductMaker) -> Head | ByteHead:
    """The head of a model whose other products are made by `make`."""
    return ByteHead(weight, bias) if make is byte_product else Head(weight, bias, make)
