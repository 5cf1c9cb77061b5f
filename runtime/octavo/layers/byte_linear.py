"""`byte_product`: a linear layer with weights and inputs of 8 bits, on a CPU. What encoder-decoders are made of with
`quantization="int8"`.

Each row of the weight and each row of the inputs is rounded with a scale of its own; oneDNN sums the products of bytes,
exactly, so that a row's result depends on that row alone. On one core of an EPYC with AVX512-VNNI 128 rows of
1024 x 1024 run at 400 GOP/s, in bfloat16 at 215, in float32 at 100; with a scale for each 32 values (`cpu/linear.py`)
at 340.
"""

from __future__ import annotations

from functools import partial

import torch

from octavo.layers.linear import PACKED_ROWS, Product

ROWS_AT_A_TIME = 4096
"""Rows of a weight that are held as float32 while it is rounded."""
INPUTS_MULTIPLE = 16
"""What the kernels want of the number of inputs."""


def byte_product(weight: torch.Tensor, bias: torch.Tensor | None, *, relu: bool = False) -> tuple[Product, bool]:
    """A `ProductMaker`. The result has the type of the inputs: float32 or bfloat16."""
    from octavo_kernels.cpu.byte_rows import quantise_rows, scale_rows

    packed, added = ByteWeight(weight), None if bias is None else bias.float()

    def product(x: torch.Tensor) -> torch.Tensor:
        rows, factors = quantise_rows(x.contiguous())
        return scale_rows(packed.sums(rows), factors, added, x.dtype, relu=relu)

    return product, True


byte_product_relu = partial(byte_product, relu=True)


class ByteWeight:
    """`[outputs, inputs]` as bytes in oneDNN's layout. A row with a number that is not finite has a scale that is not,
    and so have its sums."""

    def __init__(self, weight: torch.Tensor) -> None:
        rounded, self._scales = quantise_weight(weight)
        self._bytes = torch.ops.onednn.qlinear_prepack(rounded, [PACKED_ROWS, weight.shape[1]])
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._operator = torch.ops.onednn.qlinear_pointwise.default

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """uint8 `[T, inputs]`, as `quantise_rows` makes them -> float32 `[T, outputs]`, still without their scales."""
        made: torch.Tensor = self._operator(
            rows, 1.0, 128, self._bytes, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return made


def quantise_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> int8 of the same shape, float32 scales `[outputs]`: a weight is `scale * byte`, bytes from -127 to 127."""
    rounded, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    for first in range(0, len(weight), ROWS_AT_A_TIME):
        part = weight[first : first + ROWS_AT_A_TIME].float()
        highest = part.abs().amax(1, keepdim=True)
        scales[first : first + len(part)] = highest[:, 0] / 127
        rounded[first : first + len(part)] = (part * torch.where(highest > 0, 127 / highest, 0.0)).round_()
    return rounded, scales
