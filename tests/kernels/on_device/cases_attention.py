"""`paged_attention` against its twin, and against itself in other batches."""

from dataclasses import dataclass

import pytest
import torch
from far_blocks import far_cache
from octavo_kernels import paged_attention_reference, tiles
from octavo_kernels.attention_triton import paged_attention_triton

NAN = float("nan")


@dataclass
class Batch:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    counts: list[int]

    def run(self, function, **options):
        options.setdefault("scale", self.q.shape[-1] ** -0.5)
        options.setdefault("max_query_len", max(self.counts))
        options.setdefault("max_seq_len", int(self.lengths.max()))
        return function(self.q, self.k, self.v, self.table, self.starts, self.lengths, **options)

    def alone(self, b: int) -> "Batch":
        rows = slice(int(self.starts[b]), int(self.starts[b + 1]))
        starts = torch.tensor([0, self.counts[b]], dtype=torch.int32, device=self.q.device)
        part = slice(b, b + 1)
        return Batch(self.q[rows], self.k, self.v, self.table[part], starts, self.lengths[part], [self.counts[b]])


def make(device, sequences, heads=4, kv_heads=2, size=64, block=16, dtype=None, padding=0) -> Batch:
    """Sequences of (new tokens, length). Whatever no sequence owns is NaN: slots, blocks, padding rows of q.

    fp32 in the interpreter, whose bf16 rounds its own way; bf16 on a GPU, for which it compiles several times faster.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    needed = [-(-length // block) for _, length in sequences]
    order = torch.randperm(sum(needed)) + 1  # block 0 is poison, and all that a table's unused entries point to
    cache = torch.full((2, sum(needed) + 1, kv_heads, block, size), NAN, dtype=dtype)
    table = torch.zeros(len(sequences), max(needed) + 2, dtype=torch.int32)
    used = 0
    for b, (_, length) in enumerate(sequences):
        blocks = order[used : used + needed[b]]
        table[b, : needed[b]] = blocks
        used += needed[b]
        for i, number in enumerate(blocks.tolist()):
            filled = min(block, length - i * block)
            cache[:, number, :, :filled] = torch.randn(2, kv_heads, filled, size).to(dtype)
    counts = [count for count, _ in sequences]
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(counts) + padding, heads, size).to(dtype)
    q[sum(counts) :] = NAN
    lengths = torch.tensor([length for _, length in sequences], dtype=torch.int32)
    k, v = cache.to(device)
    return Batch(q.to(device), k, v, table.to(device), starts.to(device), lengths.to(device), counts)


def in_fp8(batch: Batch) -> torch.Tensor:
    """Store the batch's keys and values as FP8, with scales that differ widely between heads; returns those."""
    kv_heads = batch.k.shape[1]
    scales = (2.0 ** torch.randint(-1, 6, (2, kv_heads)) * (1 + torch.rand(2, kv_heads))).to(batch.k.device)
    batch.k = (batch.k / scales[0][:, None, None]).to(torch.float8_e4m3fn)
    batch.v = (batch.v / scales[1][:, None, None]).to(torch.float8_e4m3fn)
    return scales


def slopes(heads: int, device) -> torch.Tensor:
    """Those of the paper, and one of a head that looks at what is near only."""
    return torch.tensor([3.0, *(2.0 ** (-8 * (h + 1) / heads) for h in range(1, heads))], device=device)


def compare(batch: Batch, **options) -> None:
    expected, actual = (
        batch.run(function, **options)[: sum(batch.counts)].float()
        for function in (paged_attention_reference, paged_attention_triton)
    )
    assert torch.isfinite(expected).all()
    tolerance = 2e-5 if batch.q.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=2 * tolerance)


MIXED = [(1, 37), (19, 19), (1, 1), (0, 21), (5, 90), (33, 70), (8, 8), (9, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_mixed_lengths(device, size, dtype) -> None:
    compare(make(device, MIXED, size=size, dtype=dtype, padding=3))


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(device, group) -> None:
    compare(make(device, [(1, 50), (4, 33), (21, 40)], heads=2 * group, kv_heads=2))


@pytest.mark.parametrize("heads", [24, 71])
def test_one_kv_head_for_many(device, heads) -> None:
    compare(make(device, [(1, 20), (11, 17)], heads=heads, kv_heads=1))


@pytest.mark.parametrize("block", [16, 32, 64, 24])
def test_block_sizes(device, block) -> None:
    compare(make(device, MIXED, block=block))


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [1, 7, 33, 300])
def test_window_and_soft_cap(device, window, soft_cap) -> None:
    compare(make(device, [(1, 350), (40, 100), (6, 290)]), window=window, soft_cap=soft_cap)


def test_soft_cap_of_large_scores(device) -> None:
    compare(make(device, MIXED), soft_cap=30.0, scale=20.0)


def test_splits_of_their_full_size(device) -> None:
    compare(make(device, [(1, 600), (3, 256), (1, 257), (8, 520)]))


def test_splits_grow_when_a_sequence_would_need_too_many(device, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "MAX_SPLITS", 2)
    compare(make(device, [(1, 600), (2, 100), (1, 256), (1, 257)]), min_split=128)
    compare(make(device, [(1, 600), (2, 100)]), window=200, min_split=128)


def test_bounds_and_neighbours_change_no_bit(device) -> None:
    """Each sequence alone gives the bits it gives in the batch, also under bounds far above the truth."""
    batch = make(device, [(1, 300), (12, 40), (1, 20), (5, 270), (1, 555)], dtype=torch.bfloat16, padding=2)
    together = batch.run(paged_attention_triton)
    bounded = batch.run(paged_attention_triton, max_query_len=17, max_seq_len=4096)
    real = sum(batch.counts)
    assert torch.equal(together[:real], bounded[:real])
    for b in range(len(batch.counts)):
        rows = slice(int(batch.starts[b]), int(batch.starts[b + 1]))
        assert torch.equal(together[rows], batch.alone(b).run(paged_attention_triton)), f"sequence {b}"


def test_how_many_programs_share_the_splits_changes_no_bit(device, monkeypatch) -> None:
    batch = make(device, [(1, 700), (2, 300)])
    many = batch.run(paged_attention_triton)
    monkeypatch.setattr(tiles, "PROGRAMS_PER_SM", 1)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 1)
    assert torch.equal(many, batch.run(paged_attention_triton))


def test_rows_of_no_sequence_are_left_as_they_are(device) -> None:
    batch = make(device, [(1, 5), (10, 12)], padding=4)
    out = torch.full_like(batch.q, 7.0)
    assert batch.run(paged_attention_triton, out=out) is out
    assert (out[11:] == 7).all()
    assert not (out[:11] == 7).any()


def test_strided_queries_and_caches(device) -> None:
    """q as a slice of a QKV projection, K and V as the halves of one allocation."""
    batch = make(device, MIXED)
    tokens, heads, size = batch.q.shape
    wide = torch.full((tokens, heads + 4, size), NAN, device=device, dtype=batch.q.dtype)
    wide[:, :heads] = batch.q
    both = torch.stack([batch.k, batch.v], dim=1)
    expected = batch.run(paged_attention_triton)
    batch.q, batch.k, batch.v = wide[:, :heads], both[:, 0], both[:, 1]
    assert torch.equal(batch.run(paged_attention_triton), expected)


@pytest.mark.parametrize("size", [16, 64])
def test_queries_at_the_end_of_sources_that_they_share(device, size) -> None:
    """The attention of a decoder to its source: a sequence of one query for each token of the step, many of which have
    the same blocks, and rows of no token behind them."""
    sources = make(device, [(1, length) for length in (1, 16, 17, 90, 150)], heads=2, kv_heads=2, size=size)
    readers = torch.tensor([3, 3, 0, 4, 1, 2, *[4] * (40 if device.type == "cuda" else 1)], device=device)
    q = torch.randn(len(readers) + 2, 2, size).to(device, sources.q.dtype)
    starts = torch.arange(len(readers) + 1, dtype=torch.int32, device=device)
    batch = Batch(q, sources.k, sources.v, sources.table[readers], starts, sources.lengths[readers], [1] * len(readers))
    for split in (tiles.FEW_SPLIT, tiles.MIN_SPLIT):
        compare(batch, min_split=split)


def test_a_head_size_too_large_is_refused(device) -> None:
    with pytest.raises(ValueError, match="512"):
        make(device, [(1, 3)], size=512).run(paged_attention_triton)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1)])
def test_keys_in_common_change_nothing(device, heads, kv_heads, soft_cap) -> None:
    """Forty sequences begin with the same blocks; two of the step's are padding."""
    sequences = [(1, 200 + 7 * n) for n in range(40)] + [(0, 150), (0, 0)]
    batch = make(device, sequences, heads=heads, kv_heads=kv_heads)
    batch.table[:, : 192 // 16] = batch.table[0, : 192 // 16]
    options = {"soft_cap": soft_cap, "max_seq_len": 64 * tiles.MAX_SPLITS, "min_split": 64}
    plain = batch.run(paged_attention_triton, **options)
    assert torch.isfinite(plain).all()
    for parts in (3, 2, 0):
        shared = torch.tensor([parts], dtype=torch.int32, device=device)
        found = batch.run(paged_attention_triton, shared_splits=shared, **options)
        if device.type == "cuda":
            assert torch.equal(found, plain)
        else:
            torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_long_prompts_that_come_whole_are_left_out_on_request(device) -> None:
    batch = make(device, [(1, 37), (40, 40), (40, 41), (41, 41), (20, 20)])
    out = torch.full_like(batch.q, 7.0)
    batch.run(paged_attention_triton, longest_fresh=40, out=out)
    expected = batch.run(paged_attention_reference)
    left = slice(81, 122)
    assert (out[left] == 7).all()
    out[left] = expected[left]
    torch.testing.assert_close(out.float(), expected.float(), atol=1e-2, rtol=2e-2)
    twin = batch.run(paged_attention_reference, longest_fresh=40)
    assert not twin[left].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_fp8_cache(device, size, dtype) -> None:
    batch = make(device, [*MIXED, (1, 600)], size=size, dtype=dtype, padding=3)
    compare(batch, kv_scales=in_fp8(batch))


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 1)])
def test_fp8_cache_with_window_and_soft_cap(device, heads, kv_heads, window, soft_cap) -> None:
    batch = make(device, [(1, 350), (40, 100), (6, 290)], heads=heads, kv_heads=kv_heads)
    compare(batch, kv_scales=in_fp8(batch), window=window, soft_cap=soft_cap)


def test_keys_in_common_of_an_fp8_cache_change_nothing(device) -> None:
    batch = make(device, [(1, 200 + 7 * n) for n in range(20)])
    batch.table[:, : 192 // 16] = batch.table[0, : 192 // 16]
    options = {"kv_scales": in_fp8(batch), "max_seq_len": 64 * tiles.MAX_SPLITS, "min_split": 64}
    compare(batch, shared_splits=torch.tensor([3], dtype=torch.int32, device=device), **options)
    plain = batch.run(paged_attention_triton, **options)
    for parts in (3, 0):
        shared = torch.tensor([parts], dtype=torch.int32, device=device)
        found = batch.run(paged_attention_triton, shared_splits=shared, **options)
        if device.type == "cuda":
            assert torch.equal(found, plain)
        else:
            torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 7, 300])
def test_alibi(device, window, soft_cap, fp8) -> None:
    """Sequences in one split, in several, and in tiles of queries; the first keys of the last are seen whole."""
    batch = make(device, [(1, 20), (1, 600), (40, 100), (6, 290), (0, 30)], heads=6, kv_heads=2, padding=2)
    scales = in_fp8(batch) if fp8 else None
    options = {"window": window, "soft_cap": soft_cap, "kv_scales": scales}
    compare(batch, alibi_slopes=slopes(6, device), **options)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_alibi_for_groups_of_heads(device, group) -> None:
    batch = make(device, [(1, 50), (4, 33), (21, 40)], heads=2 * group, kv_heads=2)
    compare(batch, alibi_slopes=slopes(2 * group, device))


@pytest.mark.parametrize(
    "options", [{}, {"window": 100}, {"soft_cap": 3.0}, {"slopes": True, "window": 70}, {"fp8": True}], ids=str
)
@pytest.mark.parametrize("shape", [(4, 2, 64), (3, 1, 96), (2, 1, 128)], ids=str)
def test_invariant_queries_are_the_same_in_steps_of_any_size(device, shape, options) -> None:
    """Decoded one by one, in chunks that begin anywhere, all at once, alone and in a batch: the same bits on a GPU. The
    interpreter's products are numpy's."""
    heads, kv_heads, size = shape
    total = 900 if device.type == "cuda" else 150
    split = 256 if device.type == "cuda" else 32
    batch = make(device, [(total, total), (7, 40), (1, 70)], heads=heads, kv_heads=kv_heads, size=size)
    kinds = {name: value for name, value in options.items() if name not in ("slopes", "fp8")}
    kinds |= {"min_split": split, "invariant": True}
    if "slopes" in options:
        kinds["alibi_slopes"] = slopes(heads, device)
    if "fp8" in options:
        kinds["kv_scales"] = in_fp8(batch)
    expected = batch.run(paged_attention_reference, **kinds)
    whole = batch.run(paged_attention_triton, **kinds)
    tolerance = 1e-4 if device.type == "cpu" else 2e-2
    torch.testing.assert_close(whole.float(), expected.float(), atol=tolerance, rtol=tolerance)
    ends = [*range(1, 4), *range(50, total + 1, 37), total]
    steps = [(1, end) for end in ends] + [(17, 21), (30, 130), (64, 150), (5, split + 1), (100, total - 7)]
    if device.type == "cpu":
        steps = steps[::3]
    q, table = batch.q[:total], batch.table[:1]
    for together in ([step] for step in steps), (steps[at : at + 9] for at in range(0, len(steps), 9)):
        for group in together:
            rows = [slice(end - count, end) for count, end in group]
            counts = [count for count, _ in group]
            starts = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
            lengths = torch.tensor([end for _, end in group], dtype=torch.int32, device=device)
            part = Batch(
                torch.cat([q[row] for row in rows]), batch.k, batch.v, table.expand(len(group), -1).contiguous(),
                starts, lengths, counts,
            )  # fmt: skip
            found = part.run(paged_attention_triton, max_seq_len=total, **kinds)
            wanted = torch.cat([whole[:total][row] for row in rows])
            if device.type == "cuda":
                assert torch.equal(found, wanted), group
            else:
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_invariant_has_limits(device) -> None:
    from octavo_kernels import paged_attention

    batch = make(device, [(1, 40), (1, 30)])
    with pytest.raises(ValueError, match="128 splits"):
        batch.run(paged_attention, invariant=True, min_split=16, max_seq_len=2049)
    with pytest.raises(ValueError, match="without shared_splits"):
        batch.run(paged_attention, invariant=True, shared_splits=batch.starts[:1])


@pytest.mark.parametrize("kind", ["short", "long", "mixed", "in common"])
def test_blocks_beyond_2_to_the_31_elements(device, kind) -> None:
    """The same bits wherever the blocks lie: every second one is moved behind 2^31 elements of the cache."""
    sequences = {
        "short": [(1, 700), (1, 37), (1, 1)], "long": [(40, 90), (19, 19)], "mixed": MIXED,
        "in common": [(1, 150 + 7 * n) for n in range(10)],
    }[kind]  # fmt: skip
    batch = make(device, sequences)
    options = {}
    if kind == "in common":
        batch.table[:, : 128 // 16] = batch.table[0, : 128 // 16]
        shared = torch.tensor([2], dtype=torch.int32, device=device)
        options = {"shared_splits": shared, "min_split": 64, "max_seq_len": 64 * tiles.MAX_SPLITS}
    expected = batch.run(paged_attention_triton, **options)[: sum(batch.counts)]
    assert torch.isfinite(expected).all()
    both = far_cache(device, batch.k.dtype, tuple(batch.k.shape[1:]))
    moved = torch.arange(len(batch.k), device=device)
    moved[1::2] += len(both) - len(batch.k)
    assert int(moved[1::2].min()) * both.stride(0) >= 2**31
    for number, place in enumerate(moved.tolist()):
        both[place, 0], both[place, 1] = batch.k[number], batch.v[number]
    batch.k, batch.v, batch.table = both[:, 0], both[:, 1], moved[batch.table.long()].to(torch.int32)
    assert torch.equal(batch.run(paged_attention_triton, **options)[: sum(batch.counts)], expected)
