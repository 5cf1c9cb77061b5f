"""Weights of 4 or 8 bits as the kernels of `linear` read them: the bits of GGUF blocks, in another order.

Blocks lie along the inner dimension, 32 values each, with a scale d (and a minimum m): w = d * q + m (Q4_1),
d * (q - 8) (Q4_0), d * q (Q8_0). https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h describes their bytes.

Packed: outputs in groups of 32, blocks in order, two vectors of 16 outputs; a vector holds four inner values (Q8) or
four and the four 16 further (Q4) of 16 outputs, so that one instruction adds four products to each of 16 sums.

numpy, not torch, for the reason that `quantise` gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from octavo_kernels.cpu.quantise import BLOCK, BYTES

GROUP = 32
"""Outputs that are computed together: two vectors."""
LINE = 64
"""Bytes of a line of the cache."""
_ZERO = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 128}
_PIECE = 1 << 17
"""Bytes at a time: what is copied twice stays in the cache. 50 MB took 32 ms, whole matrices (fresh memory) 43."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight `[outputs, inputs]` in the layout of the kernels. `outputs` is a multiple of 32 (padded with zeros)."""

    bits: int
    outputs: int
    inputs: int
    quants: torch.Tensor
    """uint8, flat."""
    scales: torch.Tensor
    """float16 `[outputs / 32, inputs / 32, 32]`."""
    minima: torch.Tensor | None
    """float16 like `scales`; None: q counts from `zero`."""
    zero: int
    """What is subtracted from the unsigned q: 8 for Q4_0, 128 for Q8_0 (stored as q + 128), 0 with minima."""

    def first_bad_row(self) -> int | None:
        """The first output with a scale or minimum that is not a finite number."""
        good = self.scales.isfinite() if self.minima is None else self.scales.isfinite() & self.minima.isfinite()
        if good.all():
            return None
        return int(good.all(1).view(-1).logical_not().nonzero()[0])


def packed_bytes(kind: str, outputs: int, inputs: int) -> int:
    """What `empty_packed` needs."""
    return sum(-(-size // LINE) * LINE for size in _sizes(kind, outputs, inputs))


def empty_packed(kind: str, outputs: int, inputs: int, memory: torch.Tensor | None = None) -> Packed:
    """To be filled by a `Packer`. `memory`: uint8 `[packed_bytes(kind, outputs, inputs)]`; None: memory of its own."""
    if memory is None:
        memory = torch.empty(packed_bytes(kind, outputs, inputs), dtype=torch.uint8)
    parts, at = [], 0
    for size in _sizes(kind, outputs, inputs):
        parts.append(memory[at : at + size])
        at += -(-size // LINE) * LINE
    groups = -(-outputs // GROUP)
    scales, *minima = (part.view(torch.float16).view(groups, inputs // BLOCK, GROUP) for part in parts[1:])
    bits = 8 if kind == "Q8_0" else 4
    return Packed(bits, groups * GROUP, inputs, parts[0], scales, minima[0] if minima else None, _ZERO[kind])


def _sizes(kind: str, outputs: int, inputs: int) -> list[int]:
    numbers = -(-outputs // GROUP) * GROUP * inputs
    halves = numbers // BLOCK * 2
    return [numbers * (8 if kind == "Q8_0" else 4) // 8, *[halves] * (2 if kind == "Q4_1" else 1)]


class Packer:
    """Writes blocks of `kind` that come a few rows at a time into `packed`."""

    def __init__(self, packed: Packed, kind: str) -> None:
        words = BLOCK * packed.bits // 32
        groups, self._count = packed.outputs // GROUP, packed.inputs // BLOCK
        self._quants = packed.quants.numpy().view(np.int32).reshape(groups, self._count, 2, words, 16)
        self._halves = [part.numpy() for part in (packed.scales, packed.minima) if part is not None]
        self._size, self._head = BYTES[kind], 2 * len(self._halves)
        self._flip = np.int32(-0x7F7F7F80) if kind == "Q8_0" else None  # each byte ^ 128
        self._group = 0
        self._rest = np.empty((0, self._count * self._size), dtype=np.uint8)

    def add(self, blocks: torch.Tensor) -> None:
        """uint8 `[rows, inputs / 32 * bytes of a block]`, the next rows."""
        rows = blocks.numpy()
        if len(self._rest):
            rows = np.concatenate([self._rest, rows])
        whole = len(rows) // GROUP * GROUP
        step = max(_PIECE // rows.shape[1] // GROUP, 1) * GROUP
        for first in range(0, whole, step):
            self._write(rows[first : min(first + step, whole)])
        self._rest = rows[whole:].copy()

    def finish(self) -> None:
        """All rows are added: what is left of the last group becomes zeros."""
        if len(self._rest):
            self.add(torch.zeros(GROUP - len(self._rest), self._rest.shape[1], dtype=torch.uint8))

    def _write(self, rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        groups, count = len(rows) // GROUP, self._count
        here = slice(self._group, self._group + groups)
        blocks = rows.reshape(-1, count, self._size)
        words = np.ascontiguousarray(blocks[:, :, self._head :]).view(np.int32)
        if self._flip is not None:
            words ^= self._flip
        self._quants[here] = words.reshape(groups, 2, 16, count, -1).transpose(0, 3, 1, 4, 2)
        halves = np.ascontiguousarray(blocks[:, :, : self._head]).view(np.float16)
        for part, number in zip(self._halves, range(2), strict=False):
            part[here] = halves[:, :, number].reshape(groups, GROUP, count).transpose(0, 2, 1)
        self._group += groups


def pack(blocks: torch.Tensor, kind: str, inputs: int) -> Packed:
    """GGUF blocks of a whole matrix, uint8 `[outputs, inputs / 32 * bytes of a block]`, as the kernels want them."""
    packed = empty_packed(kind, len(blocks), inputs)
    packer = Packer(packed, kind)
    packer.add(blocks)
    packer.finish()
    return packed


def unpack(packed: Packed) -> torch.Tensor:
    """The twin of `pack`: float32 `[outputs, inputs]`."""
    groups, count = packed.outputs // GROUP, packed.inputs // BLOCK
    words = packed.quants.view(groups, count, 2, -1, 16, 4)  # group, block, vector, word, lane, byte
    words = words.permute(0, 2, 4, 1, 3, 5).reshape(packed.outputs, count, -1)
    q = words if packed.bits == 8 else torch.cat([words & 15, words >> 4], dim=-1)

    def of(values: torch.Tensor) -> torch.Tensor:
        return values.transpose(1, 2).reshape(packed.outputs, count, 1).float()

    offset = 0.0 if packed.minima is None else of(packed.minima)
    return ((q.float() - packed.zero) * of(packed.scales) + offset).view(packed.outputs, packed.inputs)
