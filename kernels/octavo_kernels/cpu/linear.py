"""Products with weights of 4 or 8 bits, on AVX512-VNNI: the weights stay in the bits of their file.

Formats are those of GGUF: blocks of 32 along the inner dimension, each with a scale d (and a minimum m): w = d * q + m
(Q4_1), d * (q - 8) (Q4_0), d * q (Q8_0). The other factor is quantised as llama.cpp does it, 8 bits with a scale for
each 32 values, so a block's product is a sum of integers, exact in any order, and a row's result depends on that row
alone: the same bits in any batch.

Packed: outputs in groups of 32, blocks in order, two vectors of 16 outputs; a vector holds four inner values (Q8) or
four and the four 16 further (Q4) of 16 outputs, so that one instruction adds four products to each of 16 sums.
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h describes the blocks.

Limit: a product of one row reads every weight once; of many rows, 8 of 11 vector operations are products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llvmlite import ir

from octavo_kernels.cpu.emit import Code, Value, f32, i32, v16b, v16f, v16h, v16i
from octavo_kernels.cpu.quantise import BYTES

BLOCK = 32
GROUP = 32
"""Outputs that are computed together: two vectors."""
ROWS = 4
"""Rows that share what was loaded of the weights. In a first trial, 4 and 6 reached 307 and 318 GOP/s on one core."""
ACTIVATION_PLANES = 3
"""Beside the bytes of a quantised row: scale, scale * sum of the bytes (float32), sum of the bytes (int32)."""


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


def pack(blocks: torch.Tensor, kind: str, inputs: int) -> Packed:
    """GGUF blocks, uint8 `[outputs, inputs / 32 * bytes of a block]`, as the kernels want them."""
    size = BYTES[kind]
    outputs, count = len(blocks), inputs // BLOCK
    padding = -outputs % GROUP
    if padding:
        blocks = torch.cat([blocks, blocks.new_zeros(padding, blocks.shape[1])])
    blocks = blocks.view(-1, count, size)
    head = 4 if kind == "Q4_1" else 2
    words = blocks[:, :, head:].contiguous().view(torch.int32)  # four inner values (or pairs of them) each
    groups = len(words) // GROUP
    quants = words.view(groups, 2, 16, count, -1).permute(0, 3, 1, 4, 2).contiguous().view(torch.uint8).view(-1)
    if kind == "Q8_0":
        quants ^= 128

    def halves(at: int) -> torch.Tensor:
        values = blocks[:, :, at : at + 2].contiguous().view(torch.float16)[..., 0]
        return values.view(groups, GROUP, count).transpose(1, 2).contiguous()

    minima = halves(2) if kind == "Q4_1" else None
    zero = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 128}[kind]
    return Packed(8 if kind == "Q8_0" else 4, len(words), inputs, quants, halves(0), minima, zero)


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


def quantise_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of the kernels that quantise rows: float32 `[T, K]` -> int8 `[T, K]`, float32 scales `[T, K / 32]`."""
    values = x.view(len(x), -1, BLOCK)
    highest = values.abs().amax(-1, keepdim=True)
    q = (values * torch.where(highest > 0, 127 / highest, 0.0)).round().to(torch.int8)
    return q.view(x.shape), highest[..., 0] / 127


# ---------------------------------------------------------------- kernels


def store_quantised(code: Code, low: Value, high: Value, place: Activations, row: Value, block: Value) -> None:
    """Quantise 32 floats (two vectors) into block `block` of row `row`. NaN and infinity make the scale NaN or
    infinity, and with it everything that is computed from the row."""
    b = code.b
    bits = [b.and_(b.bitcast(vector, v16i), code.ints(0x7FFFFFFF)) for vector in (low, high)]
    both = b.select(b.icmp_unsigned(">", bits[0], bits[1]), bits[0], bits[1])
    highest = b.bitcast(code.call("llvm.vector.reduce.umax.v16i32", i32, both), f32)
    scale = b.fdiv(highest, code.scalar(127.0))
    some = b.fcmp_ordered(">", highest, code.scalar(0.0))
    inverse = b.select(some, b.fdiv(code.scalar(127.0), highest), code.scalar(0.0))
    factor, total = code.splat(inverse), None
    for half, vector in enumerate((low, high)):
        whole = b.fptosi(code.call("llvm.roundeven.v16f32", v16f, b.fmul(vector, factor)), v16i)
        at = code.add(code.mul(row, place.inputs), code.mul(block, BLOCK), 16 * half)
        code.store(b.trunc(whole, v16b), place.bytes, at)
        total = whole if total is None else b.add(total, whole)
    count = code.call("llvm.vector.reduce.add.v16i32", i32, total)
    for plane, value in enumerate((scale, b.fmul(scale, b.sitofp(count, f32)), count)):
        code.store(value, place.planes, place.plane(code, row, block, plane))


@dataclass(frozen=True, slots=True)
class Activations:
    """Quantised rows: bytes `[T, K]`, planes `[T, 3, K / 32]`."""

    bytes: Value
    planes: Value
    inputs: int

    def plane(self, code: Code, row: Value, block: Value, number: int) -> Value:
        count = self.inputs // BLOCK
        return code.mul(code.add(code.mul(row, ACTIVATION_PLANES * count), block, number * count), 4)


def quantise_rows(module: ir.Module, name: str, inputs: int) -> None:
    """args: x float32 `[T, K]`, bytes, planes. Rows from step value 0."""
    code = Code(module, name)
    x, place = code.pointer(0), Activations(code.pointer(1), code.pointer(2), inputs)
    count = inputs // BLOCK
    first, last = code.share(code.mul(code.step_value(0), count))
    with code.loop(first, last) as item:
        low, high = (code.load(x, code.add(code.mul(item, 4 * BLOCK), 64 * half), v16f) for half in (0, 1))
        store_quantised(code, low, high, place, code.div(item, count), code.rem(item, count))
    code.finish()


def multiply(module: ir.Module, name: str, bits: int, inputs: int, *, minima: bool, zero: int, add: bool) -> None:
    """y = x W^T, or y += x W^T. args: quants, scales, minima, bytes, planes, y float32 `[T, outputs]`, outputs. Rows
    from step value 0. Threads share the groups of outputs; a group's weights stay in the first cache over all rows."""
    code = Code(module, name)
    quants, scales, low_ends = code.pointer(0), code.pointer(1), code.pointer(2)
    place, y, outputs = Activations(code.pointer(3), code.pointer(4), inputs), code.pointer(5), code.arg(6)
    rows = code.step_value(0)
    first, last = code.share(code.div(outputs, GROUP))
    many = code.mul(code.div(rows, ROWS), ROWS)
    with code.loop(first, last) as group:
        with code.loop(0, many, ROWS) as row:
            _tile(code, ROWS, bits, group, row, quants, scales, low_ends, place, y, outputs, minima, zero, add)
        with code.loop(many, rows) as row:
            _tile(code, 1, bits, group, row, quants, scales, low_ends, place, y, outputs, minima, zero, add)
    code.finish()


def _tile(
    code: Code, rows: int, bits: int, group: Value, row: Value, quants: Value, scales: Value, low_ends: Value,
    place: Activations, y: Value, outputs: Value, minima: bool, zero: int, add: bool,
) -> None:  # fmt: skip
    b, blocks = code.b, place.inputs // BLOCK
    words = bits  # 32-bit words of a block: 32 values of 4 bits are 4, of 8 bits 8
    sums = [[code.variable(code.floats(0.0)) for _ in range(2)] for _ in range(rows)]
    with code.loop(0, blocks) as block:
        place_of_block = code.add(code.mul(group, blocks), block)
        whole = [[code.ints(0)] * 2 for _ in range(rows)]
        if zero:
            for r in range(rows):
                count = code.load(place.planes, place.plane(code, code.add(row, r), block, 2), i32)
                whole[r] = [code.splat(b.mul(count, ir.Constant(i32, -zero)))] * 2
        for word in range(words):
            loaded = [
                code.load(quants, code.add(code.mul(place_of_block, 128 * words), 64 * (vector * words + word)), v16i)
                for vector in range(2)
            ]
            for part, unsigned in _unsigned(code, bits, word, loaded):
                for r in range(rows):
                    at = code.add(code.mul(code.add(row, r), place.inputs), code.mul(block, BLOCK), 4 * part)
                    signed = code.splat(code.load(place.bytes, at, i32))
                    for vector in range(2):
                        whole[r][vector] = code.dot_bytes(whole[r][vector], unsigned[vector], signed)

        def halves(base: Value) -> list[Value]:
            at = code.mul(place_of_block, 2 * GROUP)
            return [b.fpext(code.load(base, code.add(at, 32 * vector), v16h), v16f) for vector in range(2)]

        d = halves(scales)
        m = halves(low_ends) if minima else []
        for r in range(rows):
            scale, moment = (
                code.splat(code.load(place.planes, place.plane(code, code.add(row, r), block, plane), f32))
                for plane in (0, 1)
            )
            for vector in range(2):
                value = code.fma(b.fmul(b.sitofp(whole[r][vector], v16f), scale), d[vector], sums[r][vector].get())
                if minima:
                    value = code.fma(m[vector], moment, value)
                sums[r][vector].set(value)
    for r in range(rows):
        for vector in range(2):
            at = code.mul(code.add(code.mul(code.add(row, r), outputs), code.mul(group, GROUP), 16 * vector), 4)
            value = sums[r][vector].get()
            code.store(b.fadd(code.load(y, at, v16f), value) if add else value, y, at)


def _unsigned(code: Code, bits: int, word: int, loaded: list[Value]) -> list[tuple[int, list[Value]]]:
    """(which four of the 32 inner values, the unsigned bytes) of loaded words."""
    if bits == 8:
        return [(word, loaded)]
    nibble = code.ints(0x0F0F0F0F)
    high = [code.b.and_(code.b.lshr(vector, code.ints(4)), nibble) for vector in loaded]
    return [(word, [code.b.and_(vector, nibble) for vector in loaded]), (word + 4, high)]
