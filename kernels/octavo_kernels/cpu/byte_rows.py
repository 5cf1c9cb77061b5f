"""Rows of numbers as bytes with one scale each, and sums of bytes back to numbers: what stands before and behind a
product of 8 bits that a library does. Called by `octavo.layers.byte_linear`.

A row is `scale * (byte - 128)` with bytes from 1 to 255: unsigned, as the processor's products of bytes want one side.
Both kernels run on the calling thread. Between two products of a library its threads stay awake, so others would only
take turns with them; and 128 rows of 1024 take 0.02 ms here, beside 0.4 ms of the smallest product of an NLLB of 600M.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from llvmlite import ir

from octavo_kernels.cpu.compiler import Library, library_of
from octavo_kernels.cpu.emit import LANES, Code, Value, f32, i32, v16b, v16f, v16i
from octavo_kernels.cpu.program import run_alone

MIDDLE, HIGHEST = 128, 127
_NUMBERS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MASK = ir.VectorType(ir.IntType(1), LANES)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 or bfloat16 `[T, K]`, contiguous, K a multiple of 16 -> uint8 `[T, K]`, float32 scales `[T]`. A row with
    a number that is not finite has a scale that is not."""
    found, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), dtype=torch.float32)
    step = torch.tensor([x.data_ptr(), found.data_ptr(), scales.data_ptr(), x.shape[1], len(x)])
    run_alone(*_quantiser(_NUMBERS[x.dtype]), step)
    return found, scales


def quantise_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `quantise_rows`."""
    highest = x.float().abs().amax(1, keepdim=True)
    whole = (x.float() * torch.where(highest > 0, HIGHEST / highest, 0.0)).round()
    return (whole + MIDDLE).to(torch.uint8), highest[:, 0] / HIGHEST


def scale_rows(
    sums: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, *, relu: bool = False
) -> torch.Tensor:
    """float32 `[T, N]`, contiguous, times `scales` `[T]`, plus `bias` float32 `[N]`, below 0 cut off with `relu`; as
    `dtype`. In float32 the result takes the place of `sums`."""
    out = sums if dtype == torch.float32 else torch.empty(sums.shape, dtype=dtype)
    step = torch.tensor([
        sums.data_ptr(), scales.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), sums.shape[1],
        len(sums),
    ])  # fmt: skip
    run_alone(*_scaler(_NUMBERS[dtype], bias is not None, relu), step)
    return out


def scale_rows_reference(
    sums: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, *, relu: bool = False
) -> torch.Tensor:
    """The twin of `scale_rows`."""
    values = sums * scales[:, None]
    if bias is not None:
        values = values + bias
    return (values.clamp_min(0) if relu else values).to(dtype)


# ---------------------------------------------------------------- kernels


@cache
def _quantiser(kind: str) -> tuple[Library, str]:
    name = f"quantise_rows_{kind}"
    return library_of(name, partial(_quantise, name=name, kind=kind)), name


@cache
def _scaler(kind: str, bias: bool, relu: bool) -> tuple[Library, str]:
    name = f"scale_rows_{kind}{'_bias' if bias else ''}{'_relu' if relu else ''}"
    return library_of(name, partial(_scale, name=name, kind=kind, bias=bias, relu=relu)), name


def _quantise(module: ir.Module, *, name: str, kind: str) -> None:
    """A step: x, bytes, scales, K, T."""
    code = Code(module, name)
    b, width = code.b, 4 if kind == "f32" else 2
    scales, inputs = code.step_pointer(2), code.step_value(3)
    with code.loop(0, code.step_value(4)) as row:
        x = code.at(code.step_pointer(0), code.mul(row, inputs, width))
        place = code.at(code.step_pointer(1), code.mul(row, inputs))
        largest = code.variable(code.ints(0))  # magnitudes as integers: of a NaN they are the largest
        with code.loop(0, inputs, LANES) as at:
            bits = b.and_(b.bitcast(code.numbers(x, at, kind), v16i), code.ints(0x7FFFFFFF))
            held = largest.get()
            largest.set(b.select(b.icmp_unsigned(">", bits, held), bits, held))
        highest = b.bitcast(code.call("llvm.vector.reduce.umax.v16i32", i32, largest.get()), f32)
        code.store(b.fdiv(highest, code.scalar(HIGHEST)), scales, code.mul(row, 4))
        some = b.fcmp_ordered(">", highest, code.scalar(0.0))
        factor = code.splat(b.select(some, b.fdiv(code.scalar(HIGHEST), highest), code.scalar(0.0)))
        with code.loop(0, inputs, LANES) as at:
            whole = code.call("llvm.roundeven.v16f32", v16f, b.fmul(code.numbers(x, at, kind), factor))
            shifted = b.add(b.fptosi(whole, v16i), code.ints(MIDDLE))
            code.store(b.trunc(shifted, v16b), place, at)
    code.finish()


def _scale(module: ir.Module, *, name: str, kind: str, bias: bool, relu: bool) -> None:
    """A step: sums, scales, bias, out, N, T."""
    code = Code(module, name)
    b, width = code.b, 4 if kind == "f32" else 2
    added, outputs = code.step_pointer(2), code.step_value(4)
    whole = code.mul(code.div(outputs, LANES), LANES)
    lanes = ir.Constant(v16i, list(range(LANES)))
    rest = b.icmp_signed("<", lanes, code.splat(b.trunc(code.sub(outputs, whole), i32)))
    every = ir.Constant(_MASK, [1] * LANES)
    with code.loop(0, code.step_value(5)) as row:
        sums = code.at(code.step_pointer(0), code.mul(row, outputs, 4))
        out = code.at(code.step_pointer(3), code.mul(row, outputs, width))
        scale = code.splat(code.load(code.step_pointer(1), code.mul(row, 4), f32))

        def one(at: Value, mask: Value, sums: Value = sums, out: Value = out, scale: Value = scale) -> None:
            value = _masked_load(code, sums, at, mask)
            if bias:
                value = code.fma(value, scale, _masked_load(code, added, at, mask))
            else:
                value = b.fmul(value, scale)
            if relu:  # a NaN stays one
                value = b.select(b.fcmp_ordered("<", value, code.floats(0.0)), code.floats(0.0), value)
            stored, suffix = (value, "v16f32") if kind == "f32" else (code.to_bfloat(value), "v16i16")
            place, align = code.at(out, code.mul(at, width)), ir.Constant(i32, width)
            code.call(f"llvm.masked.store.{suffix}.p0", ir.VoidType(), stored, place, align, mask)

        with code.loop(0, whole, LANES) as at:
            one(at, every)
        with b.if_then(b.icmp_signed("<", whole, outputs)):
            one(whole, rest)
    code.finish()


def _masked_load(code: Code, base: Value, at: Value, mask: Value) -> Value:
    place = code.at(base, code.mul(at, 4))
    return code.call("llvm.masked.load.v16f32.p0", v16f, place, ir.Constant(i32, 4), mask, code.floats(0.0))
