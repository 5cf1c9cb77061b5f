"""The other kernels of a decoder layer on the CPU: norms, rotary positions and cache writes, attention, gated SiLU.

Between two products the activations are quantised where they are made (`linear.store_quantised`), so nothing is read
twice. Queries, keys and values are bfloat16, sums float32. Work is shared over tokens, or over (tokens, KV heads).

The cache of a block of 32 tokens and one KV head: keys as `[2, D / 2, 16, 2]` (half of the tokens, pair of dimensions,
token, dimension of the pair), values as `[16, D, 2]` (pair of tokens, dimension, token of the pair): so that one
instruction adds two products to each of 16 sums, over dimensions for the scores and over tokens for the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llvmlite import ir

from octavo_kernels.cpu.emit import Code, Value, Variable, f32, i16, i32, i64, v16f, v16i
from octavo_kernels.cpu.linear import Activations, store_quantised
from octavo_kernels.cpu.quantise import BLOCK

KEYS = 32
"""Tokens in a block of the cache."""
SPAN = 128
"""Keys between two looks at the largest score."""
SUMS = 24
"""Vectors of sums over the values that are in registers at once."""
TILE_ROWS = 12
"""Rows (tokens times query heads of a KV head) of a whole tile: their scores of a block are 24 vectors."""

TOKENS, IDS, POSITIONS, SLOTS, ROWS, ITEMS, NUM_ITEMS, BLOCK_TABLE, TABLE_WIDTH = range(9)
"""What a step holds: number of tokens; int64 ids, positions, slots (-1: none) and int32 rows of the block table, one a
token; int32 items (first token, tokens) of the attention and their number; the int32 block table and its width."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an attention layer; `eps` of its QK-norm."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    window: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def embed(module: ir.Module, name: str, hidden: int, bits: int, *, minima: bool, zero: int) -> None:
    """x[t] = row ids[t] of a packed weight (`packed.Packed`). args: quants, scales, minima, x float32 `[T, hidden]`."""
    code = Code(module, name)
    b, blocks = code.b, hidden // BLOCK
    quants, scales, low_ends, x = (code.pointer(number) for number in range(4))
    first, last = code.share(code.step_value(TOKENS))
    line = code.stack(64)
    with code.loop(first, last) as token:
        row = code.load(code.step_pointer(IDS), code.mul(token, 8), i64)
        group, lane = code.div(row, 32), code.rem(row, 32)
        vector, place = code.div(lane, 16), code.rem(lane, 16)
        with code.loop(0, blocks) as block:
            at = code.add(code.mul(group, blocks), block)
            for word in range(bits):  # 32-bit words of a row's block
                offset = code.add(code.mul(at, 128 * bits), code.mul(vector, 64 * bits), 64 * word, code.mul(place, 4))
                code.store(code.load(quants, offset, i32), line, 4 * word)
            entry = code.add(code.mul(at, 64), code.mul(lane, 2))
            scale = code.splat(b.fpext(code.load(scales, entry, ir.HalfType()), f32))
            low_end = code.splat(b.fpext(code.load(low_ends, entry, ir.HalfType()), f32)) if minima else None
            for half in range(2):
                stored = b.zext(code.load(line, 0 if bits == 4 else 16 * half, ir.VectorType(ir.IntType(8), 16)), v16i)
                if bits == 4:
                    stored = b.lshr(stored, code.ints(4)) if half else b.and_(stored, code.ints(15))
                value = b.fmul(b.sitofp(b.sub(stored, code.ints(zero)), v16f), scale)
                if low_end is not None:
                    value = b.fadd(value, low_end)
                code.store(value, x, code.mul(code.add(code.mul(token, hidden), code.mul(block, 32), 16 * half), 4))
    code.finish()


def _inverse_norm(code: Code, squares: Value, size: int, eps: float) -> Value:
    mean = code.b.fmul(code.total(squares), code.scalar(1.0 / size))
    root = code.call("llvm.sqrt.f32", f32, code.b.fadd(mean, code.scalar(eps)))
    return code.b.fdiv(code.scalar(1.0), root)


def norm(module: ir.Module, name: str, hidden: int, eps: float, *, quantised: bool) -> None:
    """RMSNorm (arXiv 1910.07467) of x float32 `[T, hidden]`. args: x, weight float32, then bytes and planes, or the
    float32 output."""
    code = Code(module, name)
    b, x, weight = code.b, code.pointer(0), code.pointer(1)
    first, last = code.share(code.step_value(TOKENS))
    with code.loop(first, last) as token:
        row = code.at(x, code.mul(token, 4 * hidden))
        squares = code.variable(code.floats(0.0))
        with code.loop(0, hidden // 16) as part:
            value = code.load(row, code.mul(part, 64), v16f)
            squares.set(code.fma(value, value, squares.get()))
        factor = code.splat(_inverse_norm(code, squares.get(), hidden, eps))

        def normed(part: Value) -> Value:
            value = b.fmul(code.load(row, code.mul(part, 64), v16f), factor)
            return b.fmul(value, code.load(weight, code.mul(part, 64), v16f))

        with code.loop(0, hidden // BLOCK) as block:
            low, high = normed(code.mul(block, 2)), normed(code.add(code.mul(block, 2), 1))
            if quantised:
                store_quantised(code, low, high, Activations(code.pointer(2), code.pointer(3), hidden), token, block)
            else:
                out = code.at(code.pointer(2), code.add(code.mul(token, 4 * hidden), code.mul(block, 4 * BLOCK)))
                code.store(low, out, 0)
                code.store(high, out, 64)
    code.finish()


def rotate_and_cache(module: ir.Module, name: str, shape: Shape, *, bias: bool, qk_norm: bool) -> None:
    """Bias, QK-norm and rotary positions (halves rotated), queries in bfloat16 with the scale of the softmax, keys and
    values into the cache. args: qkv float32, cos and sin float32 `[positions, D]`, queries, keys, values, bias, norm of
    q, norm of k, bytes from block to block."""
    code = Code(module, name)
    b, size, half = code.b, shape.head_dim, shape.head_dim // 2
    qkv, table, queries, keys, values = (code.pointer(number) for number in range(5))
    width = (shape.heads + 2 * shape.kv_heads) * size
    scale = shape.head_dim**-0.5 * math.log2(math.e)  # the attention takes powers of two
    line = code.stack(2 * size)
    first, last = code.share(code.step_value(TOKENS))
    with code.loop(first, last) as token:
        position = code.load(code.step_pointer(POSITIONS), code.mul(token, 8), i64)
        slot = code.load(code.step_pointer(SLOTS), code.mul(token, 8), i64)
        angles = code.at(table, code.mul(position, 4 * size))
        row = code.at(qkv, code.mul(token, 4 * width))
        block, place = code.div(slot, KEYS), code.rem(slot, KEYS)

        def head(number: Value, norm_at: int | None) -> list[Value]:
            parts = []
            for part in range(size // 16):
                at = code.add(code.mul(number, 4 * size), 64 * part)
                value = code.load(row, at, v16f)
                parts.append(b.fadd(value, code.load(code.pointer(5), at, v16f)) if bias else value)
            if norm_at is not None and qk_norm:
                squares = code.floats(0.0)
                for value in parts:
                    squares = code.fma(value, value, squares)
                factor = code.splat(_inverse_norm(code, squares, size, shape.eps))
                weight = code.pointer(norm_at)
                parts = [b.fmul(b.fmul(v, factor), code.load(weight, 64 * n, v16f)) for n, v in enumerate(parts)]
            return parts

        def rotated(parts: list[Value]) -> list[Value]:
            low, high = [], []
            for part in range(half // 16):
                x, y = parts[part], parts[part + half // 16]
                cos, sin = (code.load(angles, 64 * part + 4 * half * n, v16f) for n in range(2))
                low.append(b.fsub(b.fmul(x, cos), b.fmul(y, sin)))
                high.append(code.fma(y, cos, b.fmul(x, sin)))
            return low + high

        with code.loop(0, shape.heads) as number:
            for part, value in enumerate(rotated(head(number, 6))):
                at = code.add(code.mul(code.add(code.mul(token, shape.heads), number), 2 * size), 32 * part)
                code.store(code.to_bfloat(b.fmul(value, code.floats(scale))), queries, at)
        written = b.icmp_signed(">=", slot, code.integer(0))
        with b.if_then(written), code.loop(0, shape.kv_heads) as number:
            base = code.add(code.mul(block, code.arg(8)), code.mul(number, KEYS * size * 2))
            for part, value in enumerate(rotated(head(code.add(number, shape.heads), 7))):
                code.store(code.to_bfloat(value), line, 32 * part)
            half_at, lane_at = code.mul(code.div(place, 16), 32 * size), code.mul(code.rem(place, 16), 4)
            key = code.at(keys, code.add(base, half_at, lane_at))
            with code.loop(0, half) as pair:
                code.store(code.load(line, code.mul(pair, 4), i32), key, code.mul(pair, 64))
            for part, value in enumerate(head(code.add(number, shape.heads + shape.kv_heads), None)):
                code.store(code.to_bfloat(value), line, 32 * part)
            pair_at, place_at = code.mul(code.div(place, 2), 4 * size), code.mul(code.rem(place, 2), 2)
            into = code.at(values, code.add(base, pair_at, place_at))
            with code.loop(0, size) as dim:
                code.store(code.load(line, code.mul(dim, 2), i16), into, code.mul(dim, 4))
    code.finish()


def attention(module: ir.Module, name: str, shape: Shape, tokens: int) -> None:
    """Causal attention over the paged cache, with a running softmax (arXiv 2205.14135), for items of up to `tokens`
    tokens of one sequence; the query heads of a KV head are rows of one tile. args: queries, keys, values, bytes and
    planes of the output, bytes from block to block. A row's result depends neither on its tile nor on its neighbours.

    Threads take items in turns, with all heads, whose keys and values lie together in the cache's blocks; if there are
    fewer items than threads, single heads."""
    code = Code(module, name)
    items = code.step_value(NUM_ITEMS)
    enough = code.b.icmp_signed(">=", items, code.threads)
    together = code.b.select(enough, code.integer(shape.kv_heads), code.integer(1))
    units = code.div(code.mul(items, shape.kv_heads), together)
    with (
        code.loop(code.thread, units, code.threads) as unit,
        code.loop(code.mul(unit, together), code.mul(code.add(unit, 1), together)) as work,
    ):
        item, head = code.div(work, shape.kv_heads), code.rem(work, shape.kv_heads)
        at = code.mul(item, 8)
        token, count = (code.load_int(code.step_pointer(ITEMS), code.add(at, 4 * n)) for n in range(2))
        if tokens > 1:
            with code.b.if_else(code.b.icmp_signed("==", count, code.integer(tokens))) as (whole, part):
                with whole:
                    _Tile(code, shape, tokens, token, head).attend()
                with part, code.loop(0, count) as number:
                    _Tile(code, shape, 1, code.add(token, number), head).attend()
        else:
            _Tile(code, shape, 1, token, head).attend()
    code.finish()


class _Tile:
    """Writes the attention of some tokens of one sequence, for one KV head: `rows` rows (token, head of the group).

    Keys are taken `SPAN` at a time, from a multiple of `SPAN` on: scores of a span, one look at the largest, weights,
    then the sums over the values. So what is done once a span (folding a vector to its largest value, shrinking what
    was summed) costs little beside the products."""

    def __init__(self, code: Code, shape: Shape, tokens: int, token: Value, head: Value) -> None:
        self.code, self.shape, self.tokens, self.token, self.head = code, shape, tokens, token, head
        self.rows, size, b = tokens * shape.group, shape.head_dim, code.b
        self.position = code.load(code.step_pointer(POSITIONS), code.mul(token, 8), i64)  # of the first token
        table_row = code.load_int(code.step_pointer(ROWS), code.mul(token, 4))
        self.table = code.at(code.step_pointer(BLOCK_TABLE), code.mul(table_row, code.step_value(TABLE_WIDTH), 4))
        self.queries = []
        for r in range(self.rows):
            of_token = code.mul(code.add(token, r // shape.group), shape.heads)
            number = code.add(of_token, code.mul(head, shape.group), r % shape.group)
            self.queries.append(code.at(code.pointer(0), code.mul(number, 2 * size)))
        self.highest = [code.variable(code.scalar(-1e30)) for _ in range(self.rows)]
        self.sums = [code.variable(code.floats(0.0)) for _ in range(self.rows)]
        self.output, self.scores, self.weights = (
            code.stack(self.rows * bytes_of_row) for bytes_of_row in (4 * size, 4 * SPAN, 2 * SPAN)
        )
        for at in range(0, 4 * self.rows * size, 64):
            code.store(code.floats(0.0), self.output, at)
        self.blocks = code.add(code.div(code.add(self.position, tokens - 1), KEYS), 1)
        self.oldest = code.integer(0)
        if shape.window:
            oldest = code.sub(self.position, shape.window - 1)
            self.oldest = b.select(b.icmp_signed(">", oldest, code.integer(0)), oldest, code.integer(0))

    def attend(self) -> None:
        code, b = self.code, self.code.b
        spans = code.div(code.add(self.blocks, SPAN // KEYS - 1), SPAN // KEYS)
        with code.loop(code.div(self.oldest, SPAN), spans) as span:
            first = code.mul(span, SPAN // KEYS)
            left = code.sub(self.blocks, first)
            whole = code.integer(SPAN // KEYS)
            count = b.select(b.icmp_signed("<", left, whole), left, whole)
            largest = [code.variable(code.floats(-1e30)) for _ in range(self.rows)]
            with code.loop(0, count) as block:
                self._score(block, code.add(first, block), largest)
            shrink = []
            for r in range(self.rows):
                before = self.highest[r].get()
                now = code.maximum(code.highest(largest[r].get()), before)
                self.highest[r].set(now)
                shrink.append(code.exp2(code.splat(b.fsub(before, now))))
                self.sums[r].set(b.fmul(self.sums[r].get(), shrink[r]))
            with code.loop(0, count) as block:
                self._weigh(block)
            self._add_values(first, count, shrink)
        self._finish()

    def _base(self, block: Value) -> Value:
        """Where the cache has a block of this sequence and head, in bytes."""
        code = self.code
        number = code.load_int(self.table, code.mul(block, 4))
        return code.add(code.mul(number, code.arg(5)), code.mul(self.head, KEYS * self.shape.head_dim * 2))

    def _score(self, place: Value, block: Value, largest: list[Variable]) -> None:
        """Scores of a block; keys further than the query, or out of the window, get minus infinity."""
        code, b, size = self.code, self.code.b, self.shape.head_dim
        base = self._base(block)
        last = code.sub(self.blocks, 1)
        after = self._base(b.select(b.icmp_signed("<", block, last), code.add(block, 1), last))
        scores = [[code.variable(code.floats(0.0)) for _ in range(2)] for _ in range(self.rows)]
        with code.loop(0, size // 2) as pair:
            line = code.add(base, code.mul(pair, 64))
            key = [code.load(code.pointer(1), code.add(line, 32 * size * half), v16i) for half in range(2)]
            # these values and the next keys come meanwhile: for 64 sequences of 256 tokens, 15 ms a step instead of 21
            for half in range(2):
                code.prefetch(code.pointer(2), code.add(base, code.mul(pair, 128), 64 * half))
                code.prefetch(code.pointer(1), code.add(after, code.mul(pair, 128), 64 * half))
            for r in range(self.rows):
                factor = code.splat(code.load(self.queries[r], code.mul(pair, 4), i32))
                for half in range(2):
                    scores[r][half].set(code.dot_pairs(scores[r][half].get(), key[half], factor))
        lanes = ir.Constant(v16i, list(range(16)))
        for r in range(self.rows):
            limit = b.trunc(code.sub(code.add(self.position, r // self.shape.group), code.mul(block, KEYS)), i32)
            for half in range(2):
                number = b.add(lanes, code.ints(16 * half))
                visible = b.icmp_signed("<=", number, code.splat(limit))
                if self.shape.window:
                    low = code.splat(b.sub(limit, ir.Constant(i32, self.shape.window)))
                    visible = b.and_(visible, b.icmp_signed(">", number, low))
                score = b.select(visible, scores[r][half].get(), code.floats(-math.inf))
                code.store(score, self.scores, code.add(code.mul(place, 4 * KEYS), 4 * (r * SPAN + 16 * half)))
                largest[r].set(code.maximum(score, largest[r].get()))

    def _weigh(self, place: Value) -> None:
        code, b = self.code, self.code.b
        for r in range(self.rows):
            now = code.splat(self.highest[r].get())
            for half in range(2):
                at = r * SPAN + 16 * half
                score = code.load(self.scores, code.add(code.mul(place, 4 * KEYS), 4 * at), v16f)
                weight = code.exp2(b.fsub(score, now))
                self.sums[r].set(b.fadd(self.sums[r].get(), weight))
                code.store(code.to_bfloat(weight), self.weights, code.add(code.mul(place, 2 * KEYS), 2 * at))

    def _add_values(self, first: Value, count: Value, shrink: list[Value]) -> None:
        code, b, size = self.code, self.code.b, self.shape.head_dim
        width = min(size, 16 * max(1, SUMS // self.rows))
        for start in range(0, size, width):
            parts = range(min(width, size - start) // 16)
            places = [[4 * (r * size + start + 16 * p) for p in parts] for r in range(self.rows)]
            into = [
                [code.variable(b.fmul(code.load(self.output, place, v16f), shrink[r])) for place in places[r]]
                for r in range(self.rows)
            ]
            with code.loop(0, count) as block:
                base = code.add(self._base(code.add(first, block)), 4 * start)
                with code.loop(0, KEYS // 2) as pair:
                    line = code.add(base, code.mul(pair, 4 * size))
                    value = [code.load(code.pointer(2), code.add(line, 64 * p), v16i) for p in parts]
                    of_pair = code.add(code.mul(block, 2 * KEYS), code.mul(pair, 4))
                    for r in range(self.rows):
                        factor = code.splat(code.load(self.weights, code.add(of_pair, 2 * r * SPAN), i32))
                        for p in parts:
                            into[r][p].set(code.dot_pairs(into[r][p].get(), value[p], factor))
            for r in range(self.rows):
                for p in parts:
                    code.store(into[r][p].get(), self.output, places[r][p])

    def _finish(self) -> None:
        code, b, shape = self.code, self.code.b, self.shape
        place = Activations(code.pointer(3), code.pointer(4), shape.heads * shape.head_dim)
        blocks = shape.head_dim // BLOCK
        for r in range(self.rows):
            factor = code.splat(b.fdiv(code.scalar(1.0), code.total(self.sums[r].get())))
            for part in range(blocks):
                at = [4 * (r * shape.head_dim + 32 * part + 16 * half) for half in range(2)]
                low, high = (b.fmul(code.load(self.output, offset, v16f), factor) for offset in at)
                head = code.add(code.mul(self.head, shape.group), r % shape.group)
                number = code.add(code.mul(head, blocks), part)
                store_quantised(code, low, high, place, code.add(self.token, r // shape.group), number)


def gate(module: ir.Module, name: str, inner: int) -> None:
    """silu(g) * u of float32 `[T, 2 * inner]`, quantised. args: gate and up, bytes, planes."""
    code = Code(module, name)
    b, both, place = code.b, code.pointer(0), Activations(code.pointer(1), code.pointer(2), inner)
    blocks = inner // BLOCK
    first, last = code.share(code.mul(code.step_value(TOKENS), blocks))
    with code.loop(first, last) as work:
        token, block = code.div(work, blocks), code.rem(work, blocks)
        row = code.at(both, code.add(code.mul(token, 8 * inner), code.mul(block, 4 * BLOCK)))
        results = []
        for half in range(2):
            g, u = code.load(row, 64 * half, v16f), code.load(row, 4 * inner + 64 * half, v16f)
            power = code.exp2(b.fmul(g, code.floats(-math.log2(math.e))))
            results.append(b.fmul(b.fdiv(g, b.fadd(code.floats(1.0), power)), u))
        store_quantised(code, results[0], results[1], place, token, block)
    code.finish()
