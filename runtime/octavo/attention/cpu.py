"""Attention on the CPU: blocks are gathered into dense keys and values, then two batched products and a softmax.

The query heads of a KV head are rows of one product, so keys and values are read once a group. Decoding sequences run
in a few groups of similar length; a prefill chunk runs in tiles of queries, each against the keys it can see.

Bits do not depend on the batch: keys are padded to a multiple of `KV_PAD` behind a mask, and padding adds exact zeros.
Measured with torch 2.13 on AVX-512 over lengths 1..2048, groups 1..7, head sizes 16..128: in bfloat16 a query gives the
same bits alone, in any batch, and as the last row of any chunk. In float32 the products do so too if row counts are
multiples of 4 and the product with the values is done in tiles of at most 128 keys (longer ones are split differently
by length: 192 keys and the same 192 padded to 256 gave other bits).

Two products and a softmax are also 2x faster than `scaled_dot_product_attention` for 64 decoding sequences (0.23 ms
against 0.46 ms at 64 keys, 0.58 against 1.26 at 256, bfloat16).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from octavo.attention.base import AttentionBackend, LayerCache, PreparedAttention
from octavo.execute.context import StepInputs

KV_PAD = 64
VALUE_TILE = 128
QUERY_TILE = 128
GROUP_MIN = 8
GROUP_SHRINK = 0.5
"""A new group starts where sequences are shorter than this share of the group's longest: less padding, more calls. 0.4
to 0.7 are level (64 sequences of 30..380 tokens, 30 layers: 47 to 50 ms); a call more costs as much as 8 sequences."""


def few_sizes(count: int, multiple: int) -> int:
    """`count` padded to a multiple of `multiple` that grows with it: eight sizes from one power of two to the next.

    For oneDNN, which multiplies bfloat16. It makes code for each shape that it meets: 1 to 2 ms, and 0.6 MB that it
    keeps (of the last 1,024 shapes; some of it for good; by hand, torch 2.13 on a Xeon with AMX). Where every number of
    tokens, sequences and keys was a shape of its own, a tiny model's server grew to 1.26 GB in 12,000 requests
    (`benchmarks/server_requests.py`).
    """
    step = max(multiple, (1 << (count - 1).bit_length()) // 16 // multiple * multiple)
    return -(-count // step) * step


def every_size(count: int, multiple: int) -> int:
    """`count` padded to a multiple of `multiple`. For MKL, which multiplies float32 and keeps nothing of a shape."""
    return -(-count // multiple) * multiple


class CpuAttention(AttentionBackend):
    """`pad`: keys are padded to a multiple of this, itself a multiple of the block size. Below `KV_PAD` it is faster
    for short sequences, and bits depend on the batch."""

    default_block_size = 32

    def __init__(self, dtype: torch.dtype, pad: int = KV_PAD) -> None:
        self._row_multiple, self.pad = 2 if dtype == torch.bfloat16 else 4, pad
        self.size = few_sizes if dtype == torch.bfloat16 else every_size
        """How whatever is counted in a product's shape is padded."""
        self.scratch = Scratch()

    def padded(self, rows: int) -> int:
        """See `AttentionBackend`: for fewer rows the products would depend on the batch."""
        return self.size(rows, self._row_multiple)

    def prepare(self, inputs: StepInputs) -> PreparedAttention:
        return _Prepared(inputs, self)

    def prepare_cross(self, inputs: StepInputs, sources: Sequence[int]) -> PreparedAttention:
        return _Prepared(inputs, self, sources)


class Scratch:
    """Buffers that live from step to step. Fresh ones of some megabytes a layer would be given back to the system each
    time and cost a page fault for every 4 KiB: a third of the time of 64 decoding sequences at 200 tokens, measured."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of this shape with some finite numbers in it; the next `take` of the same name reuses it."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.zeros(size + size // 4, dtype=dtype)
        return buffer[:size].view(shape)


@dataclass(slots=True)
class _Workspace:
    """Where one part is computed: views of the scratch buffers, made for the first layer and used by all."""

    index: torch.Tensor
    """[N * KH * P / block_size] rows of a cache seen as [blocks * KH, block_size * D]: (sequence, KV head, block)."""
    rows: torch.Tensor
    """[N * KH, R, D] the queries; R is M * G, padded. Padding may hold anything finite."""
    queries: torch.Tensor
    """[S, M, KH, G, D] the same memory without the padding."""
    blocks: torch.Tensor
    """[N * KH * P / block_size, block_size * D] gathered keys; then the values take their place."""
    dense: torch.Tensor
    """[N * KH, P, D] the same memory."""
    scores: torch.Tensor
    """[N * KH, R, P]"""
    visible: torch.Tensor
    """[N, KH, M, G, P] the scores without the padding."""
    weights: torch.Tensor
    """[N * KH, R, P]"""
    result: torch.Tensor
    """[N * KH, R, D]"""
    attended: torch.Tensor
    """[S, M, KH, G, D] the result without the padding."""


@dataclass(slots=True)
class _Part:
    """Queries that run together: `N` sequences with `M` query tokens each, over `P` padded keys. `S` of them are there,
    the rest is padding."""

    tokens: slice
    """The S * M tokens, in the order of `_Prepared`."""
    blocks: torch.Tensor
    """[N, P / block_size] blocks of the keys, the null block where there are none."""
    positions: torch.Tensor
    """[N, M] positions of the queries."""
    biases: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """By window and bias by distance: [N, 1 or KH, M, 1 or G, P] added to the scores, -inf where a key is hidden."""
    workspaces: dict[tuple[int, int], _Workspace] = field(default_factory=dict)
    """By numbers of query and KV heads."""

    def bias(
        self, window: int, keys: int, dtype: torch.dtype, by_distance: torch.Tensor | None, kv_heads: int
    ) -> torch.Tensor:
        name = window, id(by_distance)
        if name not in self.biases:
            key = torch.arange(keys)
            query = self.positions.unsqueeze(-1)
            hidden = key > query
            if window > 0:
                hidden |= key <= query - window
            if by_distance is None:
                bias = torch.zeros(hidden.shape, dtype=dtype)[:, None, :, None, :]
            else:
                distance = (query - key).clamp_(0, by_distance.shape[1] - 1)
                shape = (kv_heads, -1, *distance.shape)
                bias = by_distance[:, distance].to(dtype).view(shape).permute(2, 0, 3, 1, 4)
            self.biases[name] = bias.masked_fill(hidden[:, None, :, None, :], float("-inf"))
        return self.biases[name]

    def workspace(self, backend: CpuAttention, q: torch.Tensor, kv_heads: int, size: int) -> _Workspace:
        """`q` `[T, H, D]` for its sizes and its dtype; `size`: tokens in a block."""
        heads, dim = q.shape[1:]
        if (heads, kv_heads) not in self.workspaces:
            (n, m), group = self.positions.shape, heads // kv_heads
            real = (self.tokens.stop - self.tokens.start) // m
            keys, used = self.blocks.shape[1] * size, m * group
            batch, rows = n * kv_heads, backend.padded(used)

            def take(name: str, *shape: int) -> torch.Tensor:
                return backend.scratch.take(name, shape, q.dtype)

            def without_padding(padded: torch.Tensor) -> torch.Tensor:
                return padded[:, :used].view(n, kv_heads, m, group, -1)

            index = self.blocks.long()[:, None, :] * kv_heads + torch.arange(kv_heads)[:, None]
            queries, result = take("queries", batch, rows, dim), take("result", batch, rows, dim)
            scores, blocks = take("scores", batch, rows, keys), take("blocks", batch * keys // size, size * dim)
            self.workspaces[heads, kv_heads] = _Workspace(
                index.reshape(-1), queries, without_padding(queries)[:real].transpose(1, 2), blocks,
                blocks.view(batch, keys, dim), scores, without_padding(scores), take("weights", batch, rows, keys),
                result, without_padding(result)[:real].transpose(1, 2),
            )  # fmt: skip
        return self.workspaces[heads, kv_heads]


class _Prepared(PreparedAttention):
    def __init__(self, inputs: StepInputs, backend: CpuAttention, sources: Sequence[int] | None = None) -> None:
        self.backend = backend
        self.tokens = sum(inputs.counts)
        self.block_size = inputs.block_size
        self.order: torch.Tensor | None = None
        """[T] the step's tokens in the order of the parts, and back; None: it is the same order."""
        self.back: torch.Tensor | None = None
        if sources is None:
            self.parts = [*self._decode_parts(inputs), *self._prefill_parts(inputs)]
        else:
            self.parts = self._source_parts(inputs, sources)

    def _key_blocks(self, tokens: int) -> int:
        """At most; a table may be narrower."""
        return max(self.backend.size(tokens, self.backend.pad) // self.block_size, 1)

    def _decode_parts(self, inputs: StepInputs) -> list[_Part]:
        decodes = inputs.num_decodes
        order = sorted(range(decodes), key=lambda i: -inputs.lengths[i])
        bounds = self._bounds([inputs.lengths[sequence] for sequence in order])
        if len(bounds) == 1:
            order = list(range(decodes))
        else:
            self.order = torch.tensor([*order, *range(decodes, inputs.positions.shape[0])])
            self.back = torch.argsort(self.order)
        parts: list[_Part] = []
        for begin, end in zip(bounds, [*bounds[1:], decodes], strict=True):
            if begin == end:
                continue
            padding = self.backend.size(end - begin, 1) - (end - begin)  # the last one again
            members = torch.tensor([*order[begin:end], *order[end - 1 : end] * padding])
            longest = max(inputs.lengths[sequence] for sequence in order[begin:end])
            rows = inputs.rows.index_select(0, members)
            blocks = inputs.block_table[:, : self._key_blocks(longest)].index_select(0, rows)
            parts.append(_Part(slice(begin, end), blocks, inputs.positions.index_select(0, members)[:, None]))
        return parts

    def _bounds(self, lengths: list[int]) -> list[int]:
        """Where groups of similar length begin. `lengths`: the longest first."""
        bounds = [0]
        for place, length in enumerate(lengths):
            longest = self._key_blocks(lengths[bounds[-1]])
            if self._key_blocks(length) < GROUP_SHRINK * longest and place - bounds[-1] >= GROUP_MIN:
                bounds.append(place)
        return bounds

    def _source_parts(self, inputs: StepInputs, sources: Sequence[int]) -> list[_Part]:
        """Queries of one source together, so that its keys are gathered once for all of a request's beams. A part has
        sources with equally many queries, of similar length."""
        queries: dict[int, list[int]] = {}
        for token, source in enumerate(sources):
            queries.setdefault(source, []).append(token)
        by_count: dict[int, list[list[int]]] = {}
        for tokens in queries.values():
            for begin in range(0, len(tokens), QUERY_TILE):
                tile = tokens[begin : begin + QUERY_TILE]
                by_count.setdefault(len(tile), []).append(tile)
        order: list[int] = []
        parts: list[_Part] = []
        for count, tiles in by_count.items():
            tiles.sort(key=lambda tile: -inputs.lengths[tile[0]])
            bounds = self._bounds([inputs.lengths[tile[0]] for tile in tiles])
            for begin, end in zip(bounds, [*bounds[1:], len(tiles)], strict=True):
                group = tiles[begin:end]
                blocks = self._key_blocks(inputs.lengths[group[0][0]])
                rows = torch.tensor([inputs.host_rows[tile[0]] for tile in group])
                last = torch.tensor([[inputs.lengths[tile[0]] - 1] * count for tile in group])
                first = len(order)
                order += [token for tile in group for token in tile]
                table = inputs.block_table[:, :blocks].index_select(0, rows)
                parts.append(_Part(slice(first, len(order)), table, last))
        if order != list(range(self.tokens)):
            self.order = torch.tensor([*order, *range(self.tokens, inputs.positions.shape[0])])
            self.back = torch.argsort(self.order)
        return parts

    def _prefill_parts(self, inputs: StepInputs) -> list[_Part]:
        parts: list[_Part] = []
        first = inputs.num_decodes
        for sequence in range(inputs.num_decodes, len(inputs.counts)):
            count, length = inputs.counts[sequence], inputs.lengths[sequence]
            row = inputs.host_rows[sequence]
            for begin in range(0, count, QUERY_TILE):
                end = min(begin + QUERY_TILE, count)
                tokens = slice(first + begin, first + end)
                blocks = inputs.block_table[row : row + 1, : self._key_blocks(length - count + end)]
                parts.append(_Part(tokens, blocks, inputs.positions[tokens][None]))
            first += count
        return parts

    def attend(
        self, q: torch.Tensor, cache: LayerCache, *, scale: float, window: int,
        distance_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if self.order is not None:
            q = q.index_select(0, self.order)
        out = torch.empty_like(q) if q.shape[0] == self.tokens else torch.zeros_like(q)
        width = self.block_size * q.shape[2]
        keys, values = cache.keys.view(-1, width), cache.values.view(-1, width)
        for part in self.parts:
            work = part.workspace(self.backend, q, cache.keys.shape[1], self.block_size)
            work.queries.copy_(q[part.tokens].view(work.queries.shape))
            torch.index_select(keys, 0, work.index, out=work.blocks)
            torch.bmm(work.rows, work.dense.transpose(1, 2), out=work.scores)
            bias = part.bias(window, work.dense.shape[1], q.dtype, distance_bias, cache.keys.shape[1])
            torch.add(bias, work.visible, alpha=scale, out=work.visible)
            torch.softmax(work.scores, dim=-1, out=work.weights)
            torch.index_select(values, 0, work.index, out=work.blocks)
            _apply(work.weights, work.dense, work.result)
            out[part.tokens].view(work.attended.shape).copy_(work.attended)
        return out if self.back is None else out.index_select(0, self.back)


def _apply(weights: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """weights `[B, R, P]` times values `[B, P, D]`."""
    if values.dtype == torch.bfloat16:
        torch.bmm(weights, values, out=out)
        return
    torch.bmm(weights[..., :VALUE_TILE], values[:, :VALUE_TILE], out=out)
    for begin in range(VALUE_TILE, values.shape[1], VALUE_TILE):
        out.baddbmm_(weights[..., begin : begin + VALUE_TILE], values[:, begin : begin + VALUE_TILE])
