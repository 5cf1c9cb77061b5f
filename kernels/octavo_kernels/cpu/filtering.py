"""Top-k, top-p and min-p on AVX512, behind `octavo_kernels.top_k_top_p_min_p`. On one thread, row by row.

Nothing is sorted. A threshold is found by halving the range of floats in which it lies (an integer orders floats as
their values do, so 32 halvings are exact): the largest value that at least k logits reach, then the largest one that
enough of the probability reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from llvmlite import ir

from octavo_kernels.cpu.compiler import library_of
from octavo_kernels.cpu.emit import Code, Value, Variable, f32, i32, i64, v16f, v16i
from octavo_kernels.cpu.program import run_alone

NAME = "filter"
LOGITS, TEMPERATURE, TOP_K, TOP_P, LOG_MIN_P, KEPT, WEIGHTS, VOCABULARY, STRIDE, ROWS = range(10)
"""What a step holds: pointers (`KEPT` and `WEIGHTS` are room for a row each, a vector longer than it), then sizes."""
f64, v16d, v16m = ir.DoubleType(), ir.VectorType(ir.DoubleType(), 16), ir.VectorType(ir.IntType(1), 16)
_LOWEST = float("-inf")
_MIRROR = 0x7FFFFFFF


def filter_cpu(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """`top_k_top_p_min_p` for logits on the CPU."""
    vocabulary = logits.shape[1]
    room = torch.empty(2, vocabulary + 32)
    held = [logits, temperature.contiguous(), top_k.contiguous(), top_p.contiguous(), min_p.log(), room[0], room[1]]
    sizes = (vocabulary, logits.stride(0), len(logits))
    run_alone(library_of(NAME, filter_rows), NAME, torch.tensor([*(tensor.data_ptr() for tensor in held), *sizes]))


def filter_rows(module: ir.Module) -> None:
    code = Code(module, NAME)
    b = code.b
    with code.loop(0, code.step_value(ROWS)) as row:
        whole = _Row(code, row)
        highest = whole.highest()
        usable = b.and_(b.fcmp_ordered(">", highest, code.scalar(_LOWEST)), whole.asked())
        usable = b.and_(usable, b.fcmp_ordered("<", highest, code.scalar(math.inf)))
        with b.if_then(usable):
            whole.filter(highest)
    code.finish()


class _Row:
    """One row of logits and what it asks for."""

    def __init__(self, code: Code, row: Value) -> None:
        self.code, at = code, code.mul(row, 4)
        self.logits = code.at(code.step_pointer(LOGITS), code.mul(at, code.step_value(STRIDE)))
        self.size = code.step_value(VOCABULARY)
        self.temperature, self.top_p, self.log_min_p = (
            code.load(code.step_pointer(number), at, f32) for number in (TEMPERATURE, TOP_P, LOG_MIN_P)
        )
        self.top_k = code.load_int(code.step_pointer(TOP_K), at)
        self.kept, self.weights = code.step_pointer(KEPT), code.step_pointer(WEIGHTS)

    def asked(self) -> Value:
        b, code = self.code.b, self.code
        fewer = b.and_(
            b.icmp_signed(">", self.top_k, code.integer(0)), b.icmp_signed("<", self.top_k, self.size)
        )  # fmt: skip
        some = b.or_(fewer, b.fcmp_ordered("<", self.top_p, code.scalar(1.0)))
        some = b.or_(some, b.fcmp_ordered(">", self.log_min_p, code.scalar(_LOWEST)))
        return b.and_(some, b.fcmp_ordered(">", self.temperature, code.scalar(0.0)))

    def highest(self) -> Value:
        best = self.code.variable(self.code.floats(_LOWEST))
        self._each_logit(lambda values, at, inside: best.set(self.code.maximum(values, best.get())))
        return self.code.highest(best.get())

    def filter(self, highest: Value) -> None:
        code, b = self.code, self.code.b
        threshold = code.variable(b.fadd(highest, b.fmul(self.temperature, self.log_min_p)))
        count = self._keep(threshold.get())
        few = b.and_(b.icmp_signed(">", self.top_k, code.integer(0)), b.icmp_signed("<", self.top_k, count))
        with b.if_then(few):
            threshold.set(self._search(threshold.get(), highest, lambda x: self._reached_by(x, count), self.top_k))
        ties = code.variable(self.size)
        with b.if_then(b.fcmp_ordered("<", self.top_p, code.scalar(1.0))):
            self._cut_mass(threshold, ties, highest, count)
        self._drop(threshold.get(), ties.get())

    # ---------------------------------------------------------------- the steps of it

    def _keep(self, threshold: Value) -> Value:
        """Logits from the threshold on, close together in `KEPT`, with minus infinity behind. Returns their number."""
        code, b = self.code, self.code.b
        count, limit = code.variable(code.integer(0)), code.splat(threshold)

        def some(values: Value, at: Value, inside: Value) -> None:
            mask = b.and_(b.fcmp_ordered(">=", values, limit), b.fcmp_ordered(">", values, code.floats(_LOWEST)))
            place = code.at(self.kept, code.mul(count.get(), 4))
            code.call("llvm.masked.compressstore.v16f32", ir.VoidType(), values, place, mask)
            bits = code.call("llvm.ctpop.i16", ir.IntType(16), b.bitcast(mask, ir.IntType(16)))
            count.set(code.add(count.get(), b.zext(bits, i64)))

        self._each_logit(some)
        code.store(code.floats(_LOWEST), self.kept, code.mul(count.get(), 4))
        return count.get()

    def _search(self, low: Value, high: Value, reached: Callable[[Value], Value], wanted: Value) -> Value:
        """The largest float x from `low` to `high` with `reached(x) >= wanted`; it is so at `low`."""
        code, b = self.code, self.code.b
        first, last = (code.variable(b.sext(self._order(value), i64)) for value in (low, high))
        with code.loop(0, 33):
            middle = b.ashr(code.add(first.get(), last.get(), 1), code.integer(1))
            found = reached(self._float_of(b.trunc(middle, i32)))
            less = b.fcmp_ordered if found.type == f64 else b.icmp_signed
            enough = less(">=", found, wanted)
            first.set(b.select(enough, middle, first.get()))
            last.set(b.select(enough, last.get(), code.sub(middle, 1)))
        return self._float_of(b.trunc(first.get(), i32))

    def _order(self, value: Value) -> Value:
        b, bits = self.code.b, self.code.b.bitcast(value, i32)
        mirrored = b.and_(b.ashr(bits, ir.Constant(i32, 31)), ir.Constant(i32, _MIRROR))
        return b.xor(bits, mirrored)

    def _float_of(self, order: Value) -> Value:
        b = self.code.b
        mirrored = b.and_(b.ashr(order, ir.Constant(i32, 31)), ir.Constant(i32, _MIRROR))
        return b.bitcast(b.xor(order, mirrored), f32)

    def _reached_by(self, x: Value, count: Value) -> Value:
        """How many of the kept logits are at least x."""
        code, b = self.code, self.code.b
        total, limit = code.variable(code.ints(0)), code.splat(x)
        with code.loop(0, code.div(code.add(count, 15), 16)) as number:
            reach = b.fcmp_ordered(">=", code.load(self.kept, code.mul(number, 64), v16f), limit)
            total.set(b.add(total.get(), b.zext(reach, v16i)))
        return b.zext(code.call("llvm.vector.reduce.add.v16i32", i32, total.get()), i64)

    def _cut_mass(self, threshold: Variable, ties: Variable, highest: Value, count: Value) -> None:
        code, b = self.code, self.code.b
        limit, best = code.splat(threshold.get()), code.splat(highest)
        rate = code.splat(b.fdiv(code.scalar(math.log2(math.e)), self.temperature))
        with code.loop(0, code.div(code.add(count, 15), 16)) as number:
            values = code.load(self.kept, code.mul(number, 64), v16f)
            weight = code.exp2(b.fmul(b.fsub(values, best), rate))
            weight = b.select(b.fcmp_ordered(">=", values, limit), weight, code.floats(0.0))
            code.store(weight, self.weights, code.mul(number, 64))
        total = self._mass(threshold.get(), count, ">=")
        needed = b.fmul(b.fpext(self.top_p, f64), total)
        last = self._search(threshold.get(), highest, lambda x: self._mass(x, count, ">="), needed)
        above = self._mass(last, count, ">")
        of_one = b.extract_element(code.exp2(b.fmul(b.fsub(code.splat(last), best), rate)), ir.Constant(i32, 0))
        missing = b.fdiv(b.fsub(needed, above), b.fpext(of_one, f64))
        missing = code.call("llvm.ceil.f64", f64, missing)
        one, many = ir.Constant(f64, 1.0), ir.Constant(f64, 2.0**31)
        inside = b.and_(b.fcmp_ordered(">=", missing, one), b.fcmp_ordered("<", missing, many))
        ties.set(b.fptosi(b.select(inside, missing, one), i64))
        threshold.set(last)

    def _mass(self, x: Value, count: Value, relation: str) -> Value:
        """Weights of the kept logits that are at least x, or above it. Sums are float64: they are compared."""
        code, b = self.code, self.code.b
        total, limit = code.variable(ir.Constant(v16d, [0.0] * 16)), code.splat(x)
        with code.loop(0, code.div(code.add(count, 15), 16)) as number:
            values, weight = (code.load(place, code.mul(number, 64), v16f) for place in (self.kept, self.weights))
            weight = b.select(b.fcmp_ordered(relation, values, limit), weight, code.floats(0.0))
            total.set(b.fadd(total.get(), b.fpext(weight, v16d)))
        return code.call("llvm.vector.reduce.fadd.v16f64", f64, ir.Constant(f64, 0.0), total.get())

    def _drop(self, threshold: Value, ties: Value) -> None:
        """Minus infinity below the threshold, and for those equal to it after the first `ties`."""
        code, b = self.code, self.code.b
        limit, equal = code.splat(threshold), code.variable(code.ints(0))

        def some(values: Value, at: Value, inside: Value) -> None:
            below = b.fcmp_ordered("<", values, limit)
            same = b.and_(b.fcmp_ordered("==", values, limit), inside)
            equal.set(b.add(equal.get(), b.zext(same, v16i)))
            dropped = b.and_(below, inside)
            code.call(
                "llvm.masked.store.v16f32.p0", ir.VoidType(), code.floats(_LOWEST), at, ir.Constant(i32, 4), dropped
            )

        self._each_logit(some)
        number = b.zext(code.call("llvm.vector.reduce.add.v16i32", i32, equal.get()), i64)
        with b.if_then(b.icmp_signed(">", number, ties)):
            seen = code.variable(code.integer(0))
            with code.loop(0, self.size) as token:
                at = code.mul(token, 4)
                same = b.fcmp_ordered("==", code.load(self.logits, at, f32), threshold)
                with b.if_then(same):
                    with b.if_then(b.icmp_signed(">=", seen.get(), ties)):
                        code.store(code.scalar(_LOWEST), self.logits, at)
                    seen.set(code.add(seen.get(), 1))

    def _each_logit(self, use: Callable[[Value, Value, Value], None]) -> None:
        """`use(values, address, which are there)` for 16 logits at a time; those behind the end are minus infinity."""
        code, b = self.code, self.code.b
        number = code.div(self.size, 16)
        with code.loop(0, number) as part:
            at = code.at(self.logits, code.mul(part, 64))
            use(code.load(at, 0, v16f), at, ir.Constant(v16m, [True] * 16))
        rest = code.rem(self.size, 16)
        with b.if_then(b.icmp_signed(">", rest, code.integer(0))):
            lanes = ir.Constant(v16i, list(range(16)))
            inside = b.icmp_signed("<", lanes, code.splat(b.trunc(rest, i32)))
            at = code.at(self.logits, code.mul(number, 64))
            lowest = code.floats(_LOWEST)
            values = code.call("llvm.masked.load.v16f32.p0", v16f, at, ir.Constant(i32, 4), inside, lowest)
            use(values, at, inside)
