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

from octavo_kernels.cpu.emit import Code, Value, f32, i16, i32, i64, v16f, v16i
from octavo_kernels.cpu.linear import BLOCK, Activations, store_quantised

KEYS = 32
"""Tokens in a block of the cache, and in a tile of the attention."""
WIDTH = 64
"""Output dimensions whose sums are in registers at once."""

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


def embed(module: ir.Module, name: str, hidden: int) -> None:
    """x[t] = row ids[t] of a Q8_0 weight in the packed layout. args: quants, scales, x float32 `[T, hidden]`."""
    code = Code(module, name)
    b, blocks = code.b, hidden // BLOCK
    quants, scales, x, ids = code.pointer(0), code.pointer(1), code.pointer(2), code.step_pointer(IDS)
    first, last = code.share(code.step_value(TOKENS))
    line = code.stack(64)
    with code.loop(first, last) as token:
        row = code.load(ids, code.mul(token, 8), i64)
        group, lane = code.div(row, 32), code.rem(row, 32)
        with code.loop(0, blocks) as block:
            at = code.add(code.mul(group, blocks), block)
            for word in range(8):
                vector, place = code.div(lane, 16), code.rem(lane, 16)
                offset = code.add(code.mul(at, 1024), code.mul(vector, 512), 64 * word, code.mul(place, 4))
                code.store(code.load(quants, offset, i32), line, 4 * word)
            scale = b.fpext(code.load(scales, code.add(code.mul(at, 64), code.mul(lane, 2)), ir.HalfType()), f32)
            for half in range(2):
                unsigned = b.zext(code.load(line, 16 * half, ir.VectorType(ir.IntType(8), 16)), v16i)
                value = b.fmul(b.sitofp(b.sub(unsigned, code.ints(128)), v16f), code.splat(scale))
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
    q, norm of k."""
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
            base = code.mul(code.add(code.mul(block, shape.kv_heads), number), KEYS * size * 2)
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
    planes of the output. A row's result depends neither on its tile nor on its neighbours."""
    code = Code(module, name)
    items, group = code.mul(code.step_value(NUM_ITEMS), shape.kv_heads), shape.group
    first, last = code.thread, items
    with code.loop(first, last, code.threads) as work:
        item, head = code.div(work, shape.kv_heads), code.rem(work, shape.kv_heads)
        at = code.mul(item, 8)
        token, count = (code.load_int(code.step_pointer(ITEMS), code.add(at, 4 * n)) for n in range(2))
        if tokens > 1:
            with code.b.if_else(code.b.icmp_signed("==", count, code.integer(tokens))) as (whole, part):
                with whole:
                    _attend(code, shape, tokens * group, token, head)
                with part, code.loop(0, count) as number:
                    _attend(code, shape, group, code.add(token, number), head)
        else:
            _attend(code, shape, group, token, head)
    code.finish()


def _attend(code: Code, shape: Shape, rows: int, token: Value, head: Value) -> None:
    b, size, group = code.b, shape.head_dim, shape.group
    queries, keys, values = (code.pointer(number) for number in range(3))
    tokens = rows // group
    position = code.load(code.step_pointer(POSITIONS), code.mul(token, 8), i64)  # of the first token
    table_row = code.load_int(code.step_pointer(ROWS), code.mul(token, 4))
    table = code.at(code.step_pointer(BLOCK_TABLE), code.mul(table_row, code.step_value(TABLE_WIDTH), 4))
    query = []
    for r in range(rows):
        number = code.add(code.mul(code.add(token, r // group), shape.heads), code.mul(head, group), r % group)
        query.append(code.at(queries, code.mul(number, 2 * size)))
    highest = [code.variable(code.scalar(-1e30)) for _ in range(rows)]
    sums = [code.variable(code.scalar(0.0)) for _ in range(rows)]
    output, weights = code.stack(4 * rows * size), code.stack(2 * rows * KEYS)
    for r in range(rows):
        for part in range(size // 16):
            code.store(code.floats(0.0), output, 4 * (r * size + 16 * part))
    lanes = ir.Constant(v16i, list(range(16)))
    end = code.add(code.div(code.add(position, tokens - 1), KEYS), 1)
    begin = code.integer(0)
    if shape.window:
        oldest = code.sub(position, shape.window - 1)
        begin = b.select(b.icmp_signed(">", oldest, code.integer(0)), code.div(oldest, KEYS), code.integer(0))
    with code.loop(begin, end) as tile:
        block = code.load_int(table, code.mul(tile, 4))
        base = code.mul(code.add(code.mul(block, shape.kv_heads), head), KEYS * size * 2)
        scores = [[code.variable(code.floats(0.0)) for _ in range(2)] for _ in range(rows)]
        with code.loop(0, size // 2) as pair:
            key = [code.load(keys, code.add(base, 32 * size * half, code.mul(pair, 64)), v16i) for half in range(2)]
            for r in range(rows):
                factor = code.splat(code.load(query[r], code.mul(pair, 4), i32))
                for half in range(2):
                    scores[r][half].set(code.dot_pairs(scores[r][half].get(), key[half], factor))
        shrink = []
        for r in range(rows):
            # keys further than the query, or out of the window, do not count
            limit = b.trunc(code.sub(code.add(position, r // group), code.mul(tile, KEYS)), i32)
            seen, masked = [], []
            for half in range(2):
                place = b.add(lanes, code.ints(16 * half))
                visible = b.icmp_signed("<=", place, code.splat(limit))
                if shape.window:
                    low = code.splat(b.sub(limit, ir.Constant(i32, shape.window)))
                    visible = b.and_(visible, b.icmp_signed(">", place, low))
                seen.append(visible)
                masked.append(b.select(visible, scores[r][half].get(), code.floats(-1e30)))
            before = highest[r].get()
            now = code.maximum(code.highest(code.maximum(*masked)), before)
            highest[r].set(now)
            factor = code.exp2(code.splat(b.fsub(before, now)))
            shrink.append(factor)
            total = code.floats(0.0)
            for half in range(2):
                weight = code.exp2(b.fsub(scores[r][half].get(), code.splat(now)))
                weight = b.select(seen[half], weight, code.floats(0.0))
                total = b.fadd(total, weight)
                code.store(code.to_bfloat(weight), weights, 2 * (r * KEYS + 16 * half))
            ratio = b.extract_element(factor, ir.Constant(i32, 0))
            sums[r].set(code.fma(sums[r].get(), ratio, code.total(total)))
        for start in range(0, size, WIDTH):
            parts = range(min(WIDTH, size - start) // 16)
            places = [[4 * (r * size + start + 16 * p) for p in parts] for r in range(rows)]
            into = [
                [code.variable(b.fmul(code.load(output, place, v16f), shrink[r])) for place in places[r]]
                for r in range(rows)
            ]
            with code.loop(0, KEYS // 2) as pair:
                line = code.add(base, code.mul(pair, 4 * size), 4 * start)
                value = [code.load(values, code.add(line, 64 * p), v16i) for p in parts]
                for r in range(rows):
                    factor = code.splat(code.load(weights, code.add(code.mul(pair, 4), 2 * r * KEYS), i32))
                    for p in parts:
                        into[r][p].set(code.dot_pairs(into[r][p].get(), value[p], factor))
            for r in range(rows):
                for p in parts:
                    code.store(into[r][p].get(), output, places[r][p])
    place = Activations(code.pointer(3), code.pointer(4), shape.heads * size)
    for r in range(rows):
        factor = code.splat(b.fdiv(code.scalar(1.0), sums[r].get()))
        for part in range(size // BLOCK):
            low, high = (b.fmul(code.load(output, 4 * (r * size + 32 * part + 16 * n), v16f), factor) for n in range(2))
            number = code.add(code.mul(code.add(code.mul(head, group), r % group), size // BLOCK), part)
            store_quantised(code, low, high, place, code.add(token, r // group), number)


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
            x = code.maximum(b.fmul(g, code.floats(-math.log2(math.e))), code.floats(-126.0))
            x = b.select(b.fcmp_ordered("<", x, code.floats(126.0)), x, code.floats(126.0))
            results.append(b.fmul(b.fdiv(g, b.fadd(code.floats(1.0), code.exp2(x))), u))
        store_quantised(code, results[0], results[1], place, token, block)
    code.finish()
