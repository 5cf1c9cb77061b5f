"""Linear layers. `Linear` owns one weight, which may hold several of the checkpoint's matrices one under the other.

On the CPU the weight is packed once after loading (`finish`), in the layout that oneDNN multiplies with: in bfloat16
the results are equal to the bit, and a product of few rows takes about half the time (576 x 49152 by 1 row 3.2 ms
plain, 1.6 ms packed; 64 rows 11.7 and 9.4), because the plain layout is rearranged at every call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from octavo_kernels import invariant_linear, silu_and_mul

PACKED_ROWS = 64
"""Rows of a typical step, a hint for the layout; 2 and 64 gave the same speed."""
STEADY_ROWS = 64
"""Of every product, where a row's bits must not depend on how many there are."""

Product = Callable[[torch.Tensor], torch.Tensor]
ProductMaker = Callable[[torch.Tensor, torch.Tensor | None], tuple[Product, bool]]
"""x -> x W^T + b for a weight `[outputs, inputs]` that does not change any more. True: the weight was copied into
another layout, and is not read again."""


def packs(weight: torch.Tensor) -> bool:
    """oneDNN's packed layout is the fastest way to multiply with this weight, with the same bits."""
    return weight.dtype == torch.bfloat16 and can_pack(weight)


def can_pack(weight: torch.Tensor) -> bool:
    """oneDNN has a packed layout for this weight on this CPU. In bfloat16 it needs AVX512 (or avx_ne_convert)."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def product_with(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Product, bool]:
    """By the fastest way there is to the bits of `F.linear`, for the weight's device and type."""
    if packs(weight):
        return packed_product(weight, bias)
    return lambda x: F.linear(x, weight, bias), False


def packed_product(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Product, bool]:
    """By oneDNN's packed layout where it can be, in float32 too: 105 GFLOP/s on a core instead of 70 to 90, but sums in
    another order than MKL's. Over 50 prompts of the default model that parted 10 greedy outputs from transformers', at
    near ties, instead of 3 at most; so only encoder-decoders take it."""
    if can_pack(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        operator = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: operator(x, packed, bias, "none", [], ""), True
    return lambda x: F.linear(x, weight, bias), False


def steady_product(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Product, bool]:
    """On a CPU: rows of a result do not depend on how many there are, because there are always `STEADY_ROWS`.

    On an EPYC the libraries give a row the same bits in any batch of 2 (bfloat16) or 4 rows or more, so there this is
    only slower. On a Xeon with AMX they do not: oneDNN takes other instructions for few rows than for many in bfloat16,
    and MKL, in float32, for 1, for 2 to 15 and for more."""
    product, packed = product_with(weight, bias)

    def in_tiles(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 0, -len(x) % STEADY_ROWS))
        return torch.cat([product(tile) for tile in torch.split(padded, STEADY_ROWS)])[: len(x)]

    return in_tiles, packed


def invariant_product(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Product, bool]:
    """Rows of a result do not depend on how many there are. Its price is in the README."""
    return lambda x: invariant_linear(x, weight, bias), False


class Linear:
    """y = x W^T + b, with W `[sum(parts), inputs]`. `parts` are the output sizes of the matrices fused into it."""

    def __init__(
        self, inputs: int, parts: tuple[int, ...], *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.parts = parts
        self.weight = torch.empty(sum(parts), inputs, dtype=dtype, device=device)
        self.bias = torch.empty(sum(parts), dtype=dtype, device=device) if bias else None
        self._product: Product = lambda x: F.linear(x, self.weight, self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)

    def finish(self, make: ProductMaker = product_with) -> None:
        """The weights are in place: from here on they do not change."""
        self._product, packed = make(self.weight, self.bias)
        if packed:
            self.weight = self.weight.new_empty(0)

    def targets(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Where each matrix of the checkpoint goes: a view of the weight (and of the bias) by checkpoint name."""
        parts = torch.split(self.weight, list(self.parts))
        found = {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
        if self.bias is not None:
            parts = torch.split(self.bias, list(self.parts))
            found |= {f"{name}.bias": part for name, part in zip(names, parts, strict=True)}
        return found


class GatedLinear(Linear):
    """y = silu(x G^T + b) * (x U^T + c): the first half of a gated MLP, `parts` = (outputs, outputs) of G and U.

    Where weights are packed, the silu and the product are done in the epilogues of the two matrix products: 512 rows
    of 576 x (1536 + 1536) lose the 0.4 ms that the elementwise operators took beside 4.1 ms of products, and the two
    projections are not rounded in between.
    """

    def __init__(
        self, inputs: int, parts: tuple[int, int], *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(inputs, parts, bias=bias, dtype=dtype, device=device)
        self._product = lambda x: silu_and_mul(F.linear(x, self.weight, self.bias))

    def finish(self, make: ProductMaker = product_with) -> None:
        if make is not product_with or not packs(self.weight):
            both, packed = make(self.weight, self.bias)
            self._product = lambda x: silu_and_mul(both(x))
            if packed:
                self.weight = self.weight.new_empty(0)
            return
        parts = list(self.parts)
        gate, up = (torch.ops.mkldnn._reorder_linear_weight(p, PACKED_ROWS) for p in torch.split(self.weight, parts))
        gate_bias, up_bias = (None, None) if self.bias is None else torch.split(self.bias, parts)
        activated = torch.ops.mkldnn._linear_pointwise.default
        multiplied = torch.ops.mkldnn._linear_pointwise.binary

        def product(x: torch.Tensor) -> torch.Tensor:
            factor = activated(x, gate, gate_bias, "swish", [], "")
            result: torch.Tensor = multiplied(x, factor, up, up_bias, "mul")
            return result

        self._product = product
        self.weight = self.weight.new_empty(0)
