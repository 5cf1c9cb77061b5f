"""Products with weights of 4 or 8 bits, on AVX512-VNNI: the weights stay in the bits of their file.

`packed` says how they lie. The other factor is quantised as llama.cpp does it, 8 bits with a scale for each 32 values,
so a block's product is a sum of integers, exact in any order, and a row's result depends on that row alone: the same
bits in any batch.

Limit: a product of one row reads every weight once; of many rows, 8 of 11 vector operations are products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llvmlite import ir

from octavo_kernels.cpu.emit import Code, Value, f32, i32, v16b, v16f, v16h, v16i
from octavo_kernels.cpu.packed import GROUP
from octavo_kernels.cpu.quantise import BLOCK

ROWS = 4
"""Rows that share what was loaded of the weights. In a first trial, 4 and 6 reached 307 and 318 GOP/s on one core."""
ACTIVATION_PLANES = 3
"""Beside the bytes of a quantised row: scale, scale * sum of the bytes (float32), sum of the bytes (int32)."""


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
