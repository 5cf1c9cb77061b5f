"""A small emitter of LLVM IR, in which the kernels of this folder are written. Knows no kernel.

A kernel is `void f(args, step, thread, threads)`: `args` are its own pointers and sizes, `step` what changes from step
to step, both tables of 64-bit values, so that a list of kernels is a program (`program.py`). Vectors are 512 bits wide:
16 floats or 16 integers. Variables are stack slots, which LLVM turns into registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite is untyped
    """bfloat16, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
f16, bf16, f32 = ir.HalfType(), _BFloat(), ir.FloatType()
pointer = ir.PointerType()
LANES = 16
v16i, v16f = ir.VectorType(i32, LANES), ir.VectorType(f32, LANES)
v16h, v16s, v16b = ir.VectorType(f16, LANES), ir.VectorType(i16, LANES), ir.VectorType(i8, LANES)
v16bf, v32bf = ir.VectorType(bf16, LANES), ir.VectorType(bf16, 2 * LANES)
KERNEL = ir.FunctionType(ir.VoidType(), [pointer, pointer, i64, i64])

_EXP2 = (0.009666368515, 0.05592197584, 0.2402234904, 0.6931210452, 1)

_LOG = (
    -0.08101558754, 0.1271230791, -0.1297223894, 0.1420217379, -0.166422476, 0.2000146858, -0.2500029655, 0.333333286
)  # fmt: skip

Value = Any
"""An `ir.Value`; llvmlite is untyped."""


class Code:
    """Writes one kernel into a module. Offsets are in bytes; Python integers become 64-bit constants."""

    def __init__(self, module: ir.Module, name: str) -> None:
        self.module = module
        self.function = ir.Function(module, KERNEL, name)
        self.args, self.step, self.thread, self.threads = self.function.args
        self._entry = ir.IRBuilder(self.function.append_basic_block("entry"))
        self._start = self.function.append_basic_block("start")
        self.b = ir.IRBuilder(self._start)

    def finish(self) -> None:
        self.b.ret_void()
        self._entry.branch(self._start)

    # ---------------------------------------------------------------- numbers

    def integer(self, value: Value) -> Value:
        return ir.Constant(i64, value) if isinstance(value, int) else value

    def add(self, *values: Value) -> Value:
        total = self.integer(values[0])
        for value in values[1:]:
            total = self.b.add(total, self.integer(value))
        return total

    def sub(self, a: Value, b: Value) -> Value:
        return self.b.sub(self.integer(a), self.integer(b))

    def mul(self, *values: Value) -> Value:
        product = self.integer(values[0])
        for value in values[1:]:
            product = self.b.mul(product, self.integer(value))
        return product

    def div(self, a: Value, b: Value) -> Value:
        return self.b.udiv(self.integer(a), self.integer(b))

    def rem(self, a: Value, b: Value) -> Value:
        return self.b.urem(self.integer(a), self.integer(b))

    def scalar(self, value: float) -> Value:
        return ir.Constant(f32, value)

    def floats(self, value: float) -> Value:
        return ir.Constant(v16f, [value] * LANES)

    def ints(self, value: int) -> Value:
        return ir.Constant(v16i, [value] * LANES)

    # ---------------------------------------------------------------- memory

    def arg(self, number: int) -> Value:
        """A 64-bit value of the kernel's own table."""
        return self.load(self.args, 8 * number, i64)

    def pointer(self, number: int) -> Value:
        return self.load(self.args, 8 * number, pointer)

    def step_value(self, number: int) -> Value:
        return self.load(self.step, 8 * number, i64)

    def step_pointer(self, number: int) -> Value:
        return self.load(self.step, 8 * number, pointer)

    def at(self, base: Value, offset: Value) -> Value:
        return self.b.gep(base, [self.integer(offset)], source_etype=i8)

    def load(self, base: Value, offset: Value, kind: Any) -> Value:
        return self.b.load(self.at(base, offset), typ=kind, align=1)

    def prefetch(self, base: Value, offset: Value) -> None:
        """Have a line of memory brought into the second cache; nothing happens where there is none."""
        to_read, second, data = (ir.Constant(i32, number) for number in (0, 2, 1))
        self.call("llvm.prefetch.p0", ir.VoidType(), self.at(base, offset), to_read, second, data)

    def store(self, value: Value, base: Value, offset: Value) -> None:
        self.b.store(value, self.at(base, offset), align=1)

    def numbers(self, base: Value, at: Value, kind: str) -> Value:
        """As float32, `LANES` numbers from number `at` on; `kind`: "f32" or "bf16"."""
        if kind == "f32":
            return self.load(base, self.mul(at, 4), v16f)
        return self.widened(self.load(base, self.mul(at, 2), v16s))

    def widened(self, halves: Value) -> Value:
        """Bits of bfloat16 numbers as float32 numbers."""
        return self.b.bitcast(self.b.shl(self.b.zext(halves, v16i), self.ints(16)), v16f)

    def load_int(self, base: Value, offset: Value) -> Value:
        """A signed 32-bit integer, as 64 bits."""
        return self.b.sext(self.load(base, offset, i32), i64)

    def stack(self, size: int) -> Value:
        """`size` bytes on the stack, aligned to a vector."""
        slot = self._entry.alloca(ir.ArrayType(i8, size))
        slot.align = 64
        slot.type = pointer  # without a type of what it points to, like every other pointer here
        return slot

    def variable(self, initial: Value) -> Variable:
        slot = self._entry.alloca(initial.type)
        slot.align = 64
        variable = Variable(self, slot, initial.type)
        variable.set(initial)
        return variable

    # ---------------------------------------------------------------- control

    @contextmanager
    def loop(self, start: Value, stop: Value, by: Value = 1) -> Iterator[Value]:
        """for index in range(start, stop, by)"""
        head, body, after = (self.function.append_basic_block(name) for name in ("head", "body", "after"))
        before = self.b.block
        first = self.integer(start)
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(i64)
        index.add_incoming(first, before)
        self.b.cbranch(self.b.icmp_signed("<", index, self.integer(stop)), body, after)
        self.b.position_at_end(body)
        yield index
        index.add_incoming(self.add(index, by), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)

    def share(self, total: Value) -> tuple[Value, Value]:
        """First and last + 1 of this thread's part of `total` things."""
        first = self.div(self.mul(total, self.thread), self.threads)
        return first, self.div(self.mul(total, self.add(self.thread, 1)), self.threads)

    # ---------------------------------------------------------------- vectors

    def splat(self, scalar: Value) -> Value:
        kind = ir.VectorType(scalar.type, LANES)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(i32, 0))
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), self.ints(0))

    def call(self, name: str, result: Any, *values: Value) -> Value:
        """An LLVM intrinsic, or a function of the C library, by its full name."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [value.type for value in values]), name)
        return self.b.call(function, values)

    def pause(self) -> None:
        """Tell the processor that this is a loop that waits."""
        self.call("llvm.x86.sse2.pause", ir.VoidType())

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        suffix = "v16f32" if a.type == v16f else "f32"
        return self.call(f"llvm.fma.{suffix}", a.type, a, b, c)

    def maximum(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def total(self, vector: Value) -> Value:
        """Sum of 16 floats, always in the same order: halves, quarters, eighths, pairs."""
        return self._fold(vector, self.b.fadd)

    def highest(self, vector: Value) -> Value:
        return self._fold(vector, self.maximum)

    def _fold(self, vector: Value, combine: Any) -> Value:
        width = LANES
        while width > 1:
            width //= 2
            lower, upper = ([ir.Constant(i32, at + k) for k in range(width)] for at in (0, width))
            kind = ir.VectorType(i32, width)
            undefined = ir.Constant(vector.type, ir.Undefined)
            vector = combine(
                self.b.shuffle_vector(vector, undefined, ir.Constant(kind, lower)),
                self.b.shuffle_vector(vector, undefined, ir.Constant(kind, upper)),
            )
        return self.b.extract_element(vector, ir.Constant(i32, 0))

    def dot_bytes(self, sums: Value, unsigned: Value, signed: Value) -> Value:
        """sums[lane] += four products of bytes (AVX512-VNNI)."""
        return self.call("llvm.x86.avx512.vpdpbusd.512", v16i, sums, unsigned, signed)

    def dot_pairs(self, sums: Value, a: Value, b: Value) -> Value:
        """sums[lane] += two products of bfloat16, given as 16 32-bit pairs (AVX512-BF16)."""
        a, b = self.b.bitcast(a, v32bf), self.b.bitcast(b, v32bf)
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", v16f, sums, a, b)

    def to_bfloat(self, values: Value) -> Value:
        """16 floats, rounded to the nearest, as 16 16-bit integers."""
        return self.b.bitcast(self.call("llvm.x86.avx512bf16.cvtneps2bf16.512", v16bf, values), v16s)

    def exp2(self, x: Value) -> Value:
        """2**x of 16 floats, within 4e-6 of it: zero below -150, infinite from 128 on, NaN for NaN. The polynomial is
        a fit to 2**f over [-0.5, 0.5] at Chebyshev's nodes."""
        low = self.floats(-200.0)
        x = self.b.select(self.b.fcmp_ordered(">", low, x), low, x)  # minus infinity would become NaN below
        whole = self.call("llvm.roundeven.v16f32", v16f, x)
        f = self.b.fsub(x, whole)
        value = self.floats(_EXP2[0])
        for coefficient in _EXP2[1:]:
            value = self.fma(value, f, self.floats(coefficient))
        every, rounding = ir.Constant(ir.IntType(16), -1), ir.Constant(i32, 4)
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", v16f, value, whole, self.floats(0.0), every, rounding)

    def log(self, x: Value) -> Value:
        """Natural logarithm of 16 normal floats above 0, within 1e-7 of it. Around 1 the polynomial stands alone: a fit
        to (log(1 + f) - f + f^2 / 2) / f^3 between the roots of 1/2 and 2, at Chebyshev's nodes."""
        b = self.b
        bits = b.bitcast(x, v16i)
        exponent = b.ashr(b.sub(bits, self.ints(0x3F3504F3)), self.ints(23))
        f = b.fsub(b.bitcast(b.sub(bits, b.shl(exponent, self.ints(23))), v16f), self.floats(1.0))
        value = self.floats(_LOG[0])
        for coefficient in _LOG[1:]:
            value = self.fma(value, f, self.floats(coefficient))
        square = b.fmul(f, f)
        value = self.fma(b.fmul(value, f), square, b.fmul(square, self.floats(-0.5)))
        whole = b.sitofp(exponent, v16f)
        # log(2) in two parts: the larger times the exponent is exact
        value = self.fma(whole, self.floats(-2.12194440e-4), value)
        return self.fma(whole, self.floats(0.693359375), b.fadd(f, value))


class Variable:
    """A value that changes."""

    def __init__(self, code: Code, slot: Value, kind: Any) -> None:
        self._code, self._slot, self._kind = code, slot, kind

    def get(self) -> Value:
        return self._code.b.load(self._slot, typ=self._kind)

    def set(self, value: Value) -> None:
        self._code.b.store(value, self._slot)
