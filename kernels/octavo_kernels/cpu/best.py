"""The highest logits of a row and the logarithm of the sum of all exponentials, of logits that come a span of the
vocabulary at a time: nobody holds all of them. Called by `octavo.layers.head` for beams.

A span is looked at while it is still in the cache: its maximum, then its exponentials; what exceeds the lowest of a
row's best so far is sorted in, which happens some ten times a span. For 128 rows of 256206 that takes 15 ms of one
thread. From one product of all, the sums alone took 40 ms and the best 7, and 131 MB went to memory and back.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from llvmlite import ir

from octavo_kernels.cpu.compiler import Library, library_of
from octavo_kernels.cpu.emit import LANES, Code, Value, f32, i32, v16f, v16i, v16s
from octavo_kernels.cpu.program import run_alone

_NUMBERS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_LOG2_E = 1.4426950408889634


class Best:
    """What is known of S rows so far: `values` float32 and `tokens` int32 `[S, count]`, the highest first, of equal
    ones the lowest token; unused places are minus infinity."""

    def __init__(self, rows: int, count: int) -> None:
        self.values = torch.full((rows, count), float("-inf"))
        self.tokens = torch.zeros(rows, count, dtype=torch.int32)
        self._tops, self._totals = torch.full((rows,), float("-inf")), torch.zeros(rows)

    def see(self, logits: torch.Tensor, first: int, factors: torch.Tensor | None = None) -> None:
        """float32 or bfloat16 `[S, N]`, contiguous, of tokens `first` to `first + N`; spans come in order. `factors`
        `[S]` float32: what the logits of each row still are to be multiplied with."""
        factors = torch.ones(len(logits)) if factors is None else factors
        state = (logits, self.values, self.tokens, self._tops, self._totals, factors)
        sizes = (logits.shape[1], self.values.shape[1], first, len(logits))
        step = torch.tensor([*(tensor.data_ptr() for tensor in state), *sizes])
        kind = _NUMBERS[logits.dtype]
        run_alone(_library(kind), f"best_{kind}", step)

    def log_sums(self) -> torch.Tensor:
        """float32 `[S]`; NaN for a row that has one."""
        return self._tops + self._totals.log()


def best_reference(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin, of all logits at once: values, tokens and sums."""
    values, tokens = logits.float().sort(dim=1, descending=True, stable=True)
    return values[:, :count], tokens[:, :count].int(), torch.logsumexp(logits.float(), dim=1)


@cache
def _library(kind: str) -> Library:
    return library_of(f"best_{kind}", partial(_see, kind=kind))


def _see(module: ir.Module, *, kind: str) -> None:
    """A step: logits, values, tokens, tops, totals, factors, N, count, first token, S."""
    code = Code(module, f"best_{kind}")
    b, width = code.b, 4 if kind == "f32" else 2
    size, count, first = (code.step_value(number) for number in (6, 7, 8))
    whole = code.mul(code.div(size, LANES), LANES)
    rest = b.icmp_signed("<", ir.Constant(v16i, list(range(LANES))), code.splat(b.trunc(code.sub(size, whole), i32)))
    with code.loop(0, code.step_value(9)) as row:
        logits = code.at(code.step_pointer(0), code.mul(row, size, width))
        values = code.at(code.step_pointer(1), code.mul(row, count, 4))
        tokens = code.at(code.step_pointer(2), code.mul(row, count, 4))
        tops, totals = (code.at(code.step_pointer(number), code.mul(row, 4)) for number in (3, 4))

        own = code.load(code.step_pointer(5), code.mul(row, 4), f32)
        factor = code.splat(own)

        highest = code.variable(code.splat(code.load(tops, 0, f32)))
        with code.loop(0, whole, LANES) as at:
            highest.set(code.maximum(b.fmul(code.numbers(logits, at, kind), factor), highest.get()))
        # outside a factor of 0 would make NaN of minus infinity
        last = b.select(rest, b.fmul(_load_rest(code, logits, whole, kind, rest), factor), code.floats(float("-inf")))
        top = code.highest(code.maximum(last, highest.get()))

        shift, to_base_2 = code.splat(top), code.floats(_LOG2_E)
        sums = code.variable(code.floats(0.0))
        lowest = code.variable(code.load(values, code.mul(code.sub(count, 1), 4), f32))

        def one(value: Value, at: Value, lanes: Value) -> None:
            sums.set(b.fadd(sums.get(), code.exp2(b.fmul(b.fsub(value, shift), to_base_2))))
            above = b.fcmp_ordered(">", value, code.splat(lowest.get()))
            some = code.call("llvm.vector.reduce.or.v16i1", ir.IntType(1), above)
            with b.if_then(some, likely=False), code.loop(0, lanes) as lane:
                token = code.add(at, lane)
                found = b.fmul(_number(code, logits, token, kind), own)
                _sort_in(code, found, code.add(first, token), values, tokens, count)
                lowest.set(code.load(values, code.mul(code.sub(count, 1), 4), f32))

        with code.loop(0, whole, LANES) as at:
            one(b.fmul(code.numbers(logits, at, kind), factor), at, code.integer(LANES))
        with b.if_then(b.icmp_signed("<", whole, size)):
            one(last, whole, code.sub(size, whole))

        before = code.exp2(b.fmul(b.fsub(code.splat(code.load(tops, 0, f32)), shift), to_base_2))
        before = b.extract_element(before, ir.Constant(i32, 0))
        total = b.fadd(b.fmul(code.load(totals, 0, f32), before), code.total(sums.get()))
        code.store(total, totals, 0)
        code.store(top, tops, 0)
    code.finish()


def _sort_in(code: Code, value: Value, token: Value, values: Value, tokens: Value, count: Value) -> None:
    """Put a value behind all that are as high; from there on each moves one place, and the last one out."""
    b = code.b
    carried, its_token = code.variable(value), code.variable(b.trunc(token, i32))
    placed = code.variable(ir.Constant(ir.IntType(1), 0))
    with code.loop(0, count) as place:
        at = code.mul(place, 4)
        held, its = code.load(values, at, f32), code.load(tokens, at, i32)
        moves = b.or_(placed.get(), b.fcmp_ordered(">", carried.get(), held))
        placed.set(moves)
        code.store(b.select(moves, carried.get(), held), values, at)
        code.store(b.select(moves, its_token.get(), its), tokens, at)
        carried.set(b.select(moves, held, carried.get()))
        its_token.set(b.select(moves, its, its_token.get()))


def _load_rest(code: Code, base: Value, at: Value, kind: str, inside: Value) -> Value:
    """Zeros where there is nothing."""
    width = 4 if kind == "f32" else 2
    held, suffix = (v16f, "v16f32") if kind == "f32" else (v16s, "v16i16")
    place, align = code.at(base, code.mul(at, width)), ir.Constant(i32, width)
    empty = ir.Constant(held, [0] * LANES)
    value = code.call(f"llvm.masked.load.{suffix}.p0", held, place, align, inside, empty)
    return value if kind == "f32" else code.widened(value)


def _number(code: Code, base: Value, at: Value, kind: str) -> Value:
    if kind == "f32":
        return code.load(base, code.mul(at, 4), f32)
    b = code.b
    half = code.load(base, code.mul(at, 2), ir.IntType(16))
    return b.bitcast(b.shl(b.zext(half, i32), ir.Constant(i32, 16)), f32)
