"""Attention on the CPU: the numbers of the oracle, from few sizes of products."""

from __future__ import annotations

import random

import pytest
import torch
from octavo.attention.base import LayerCache
from octavo.attention.cpu import CpuAttention, every_size, few_sizes
from octavo.attention.reference import ReferenceAttention
from octavo.execute.context import StepInputs

KV_HEADS, GROUP, DIM, BLOCK, WIDTH = 2, 3, 16, 32, 34


@pytest.mark.parametrize("multiple", [1, 2, 64])
def test_sizes_are_few_and_little_larger(multiple: int) -> None:
    counts = range(1, 8193)
    sizes = [few_sizes(count, multiple) for count in counts]
    assert all(size % multiple == 0 for size in sizes)
    assert all(0 <= size - count < max(multiple, count / 8) for size, count in zip(sizes, counts, strict=True))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 8 * 11
    assert [few_sizes(size, multiple) for size in sizes] == sizes
    assert every_size(65, multiple) == {1: 65, 2: 66, 64: 128}[multiple]


def step(starts: list[int], counts: list[int], total: int) -> StepInputs:
    """Every sequence in a row of its own, its blocks anywhere in the cache."""
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    blocks = list(range(1, len(counts) * WIDTH + 1))
    random.Random(len(counts)).shuffle(blocks)
    table = torch.zeros(len(counts), WIDTH, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for place in range(-(-length // BLOCK)):
            table[row, place] = blocks.pop()
    places = [(row, start + k) for row, start in enumerate(starts) for k in range(counts[row])]
    positions = torch.zeros(total, dtype=torch.int64)
    slots = torch.full((total,), -1)
    for token, (row, position) in enumerate(places):
        positions[token] = position
        slots[token] = int(table[row, position // BLOCK]) * BLOCK + position % BLOCK
    rows = list(range(len(counts)))
    return StepInputs(
        torch.zeros(total, dtype=torch.int64), positions, slots, torch.tensor(rows, dtype=torch.int32),
        torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32), table, BLOCK, rows, counts, lengths,
        sum(count == 1 for count in counts), max(counts), max(lengths),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("decodes", [1, 17, 35])
def test_it_is_the_oracles(decodes: int, window: int, dtype: torch.dtype) -> None:
    """Lengths up to the table's width: padded keys must not go beyond it."""
    rng = random.Random(decodes)
    backend = CpuAttention(dtype)
    counts = [*[1] * decodes, 5, 129, 300]
    starts = [*(rng.choice([0, rng.randrange(60), rng.randrange(WIDTH * BLOCK)]) for _ in range(decodes)), 7, 0, 530]
    starts[0] = WIDTH * BLOCK - 1
    inputs = step(starts, counts, backend.padded(sum(counts)))
    generator = torch.Generator().manual_seed(decodes)
    keys, values = (
        torch.randn(len(counts) * WIDTH + 1, KV_HEADS, BLOCK, DIM, generator=generator).to(dtype) for _ in range(2)
    )
    keys[0] = values[0] = 0
    cache = LayerCache(keys, values)
    q = torch.randn(inputs.positions.shape[0], KV_HEADS * GROUP, DIM, generator=generator).to(dtype)
    for _ in range(2):  # the second time, its buffers hold the numbers of the first
        found = backend.prepare(inputs).attend(q, cache, scale=0.3, window=window)[: sum(counts)]
        expected = ReferenceAttention().prepare(inputs).attend(q, cache, scale=0.3, window=window)[: sum(counts)]
        error = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.float(), expected.float(), atol=error, rtol=error)
        assert found.isfinite().all()
