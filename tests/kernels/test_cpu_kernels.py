"""The kernels for the CPU against their twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from octavo_kernels.cpu.compiler import Library, available
from octavo_kernels.cpu.packed import pack, unpack
from test_packed_layout import blocks_of

pytestmark = pytest.mark.skipif(not available(), reason="needs AVX512-VNNI, AVX512-BF16 and llvmlite")

if available():
    from llvmlite import ir
    from octavo_kernels.cpu import decoder, linear, program


def run(library: Library, name: str, step: list[int], *args: object, threads: int = 2) -> None:
    team = program.Team(library, threads)
    one = program.Program([(library.address(name), args)])
    team.run(one, torch.tensor(step, dtype=torch.int64))
    team.close()


def library(*kernels: object) -> Library:
    def make() -> ir.Module:
        module = ir.Module("test")
        program.functions(module)
        for kernel in kernels:
            kernel(module)
        return module

    return Library(make, cache=None)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and planes of rows, by the twin."""
    q, scale = linear.quantise_reference(x)
    count = q.view(len(x), -1, 32).to(torch.int32).sum(-1).to(torch.int32)
    return q, torch.stack([scale, scale * count, count.view(torch.float32)], dim=1).contiguous()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_products(kind: str, add: bool, threads: int) -> None:
    inputs, outputs = 160, 224
    packed = pack(blocks_of(kind, outputs, inputs), kind, inputs)
    minima = packed.minima is not None
    lib = library(
        lambda m: linear.multiply(m, "f", packed.bits, inputs, minima=minima, zero=packed.zero, add=add),
    )
    weight = unpack(packed).double()
    together = None
    x = torch.randn(13, inputs)
    q, planes = quantised(x)
    start = torch.randn(13, outputs)
    for rows in (13, 8, 4, 3, 1):
        y = start[:rows].clone() if add else torch.full((rows, outputs), float("nan"))
        args = (packed.quants, packed.scales, packed.minima, q, planes, y, outputs)
        run(lib, "f", [rows], *args, threads=threads)
        exact = (q[:rows].view(rows, -1, 32) * planes[:rows, 0, :, None]).view(rows, inputs).double() @ weight.T
        exact = exact + start[:rows] if add else exact
        torch.testing.assert_close(y.double(), exact, atol=2e-5, rtol=1e-5)
        together = y if together is None else together
        assert torch.equal(y, together[:rows]), "bits depend on the batch"


def test_rows_are_quantised_as_the_twin_does() -> None:
    x = torch.randn(7, 96) * torch.logspace(-3, 3, 7)[:, None]
    x[3] = 0
    lib = library(lambda m: linear.quantise_rows(m, "f", 96))
    q, planes = torch.zeros(7, 96, dtype=torch.int8), torch.zeros(7, 3, 3)
    run(lib, "f", [7], x, q, planes)
    wanted, wanted_planes = quantised(x)
    assert (q - wanted).abs().max() <= 1
    assert (q != wanted).float().mean() < 0.01
    torch.testing.assert_close(planes[:, 0], wanted_planes[:, 0])
    assert torch.equal(planes[:, 2].contiguous().view(torch.int32), q.view(7, 3, 32).int().sum(-1).int())
    torch.testing.assert_close(planes[:, 1], planes[:, 0] * planes[:, 2].contiguous().view(torch.int32))
    for bad in (float("nan"), float("inf")):
        x[1, 40] = bad
        run(lib, "f", [7], x, q, planes)
        assert not planes[1, 0, 1].isfinite()
        assert planes[[0, 2, 3, 4, 5, 6], 0].isfinite().all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_embedding_rows(kind: str) -> None:
    packed = pack(blocks_of(kind, 100, 64), kind, 64)
    ids = torch.tensor([0, 99, 31, 32, 63, 5])
    x = torch.zeros(6, 64)
    minima = packed.minima is not None
    lib = library(lambda m: decoder.embed(m, "f", 64, packed.bits, minima=minima, zero=packed.zero))
    run(lib, "f", [6, ids.data_ptr()], packed.quants, packed.scales, packed.minima, x)
    torch.testing.assert_close(x, unpack(packed)[ids], atol=1e-6, rtol=1e-6)


def test_norms() -> None:
    x, weight = torch.randn(5, 96) * 3, torch.rand(96) + 0.5
    expected = torch.nn.functional.rms_norm(x, (96,), weight, 1e-5)
    lib = library(
        lambda m: decoder.norm(m, "plain", 96, 1e-5, quantised=False),
        lambda m: decoder.norm(m, "quantised", 96, 1e-5, quantised=True),
    )
    out = torch.zeros(5, 96)
    run(lib, "plain", [5], x, weight, out)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    q, planes = torch.zeros(5, 96, dtype=torch.int8), torch.zeros(5, 3, 3)
    run(lib, "quantised", [5], x, weight, q, planes)
    assert (q - linear.quantise_reference(expected)[0]).abs().max() <= 1
    torch.testing.assert_close(planes[:, 0], quantised(expected)[1][:, 0], atol=1e-5, rtol=1e-4)


def test_gate() -> None:
    both = torch.cat([torch.randn(5, 160) * 4, torch.randn(5, 160)], dim=1)
    both[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -1e-20])
    expected = torch.nn.functional.silu(both[:, :160]) * both[:, 160:]
    lib = library(lambda m: decoder.gate(m, "f", 160))
    q, planes = torch.zeros(5, 160, dtype=torch.int8), torch.zeros(5, 3, 5)
    run(lib, "f", [5], both, q, planes)
    assert (q - linear.quantise_reference(expected)[0]).abs().max() <= 1
    torch.testing.assert_close(planes[:, 0], quantised(expected)[1][:, 0], atol=1e-6, rtol=1e-4)


SHAPES = [(3, 1, 64), (9, 3, 64), (4, 4, 32), (8, 2, 128), (8, 1, 96), (2, 1, 256)]


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
@pytest.mark.parametrize(("window", "extras"), [(0, False), (40, False), (0, True)])
def test_rotation_cache_and_attention(
    heads: int, kv_heads: int, size: int, window: int, extras: bool, tokens: int
) -> None:
    """Sequences prefilled in chunks: the outputs of the last chunk against dense attention in float64."""
    torch.manual_seed(heads * size + window)
    shape = decoder.Shape(heads, kv_heads, size, 1e-6, window)
    lib = library(
        lambda m: decoder.rotate_and_cache(m, "rotate", shape, bias=extras, qk_norm=extras),
        lambda m: decoder.attention(m, "attend", shape, tokens),
    )
    lengths, news = [5, 70, 33, 64, 1, 300], [5, 9, 1, 64, 1, 141]
    width = (heads + 2 * kv_heads) * size
    angles = torch.outer(torch.arange(300.0), 100.0 ** -torch.linspace(0, 1, size // 2))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    bias, q_norm, k_norm = torch.randn(width), torch.rand(size) + 0.5, torch.rand(size) + 0.5
    blocks = torch.randperm(70)[:60].view(6, 10).to(torch.int32) + 1
    keys, values = torch.randn(71, 2, kv_heads, 32, size).bfloat16().unbind(1)
    stride = 2 * keys.stride(0)
    all_qkv = [torch.randn(length, width) for length in lengths]

    def step(chunks: list[tuple[int, int, int]]) -> torch.Tensor:
        """(sequence, start, end) -> the output rows."""
        qkv = torch.cat([all_qkv[s][a:b] for s, a, b in chunks])
        positions = torch.cat([torch.arange(a, b) for _, a, b in chunks])
        rows = torch.cat([torch.full((b - a,), s, dtype=torch.int32) for s, a, b in chunks])
        slots = blocks[rows.long(), positions // 32] * 32 + positions % 32
        items, first = [], 0
        for _, a, b in chunks:
            items += [(first + i, min(tokens, b - a - i)) for i in range(0, b - a, tokens)]
            first += b - a
        item_table = torch.tensor(items, dtype=torch.int32)
        queries = torch.zeros(first, heads * size, dtype=torch.bfloat16)
        q, planes = torch.zeros(first, heads * size, dtype=torch.int8), torch.zeros(first, 3, heads * size // 32)
        numbers = [
            first, 0, positions.data_ptr(), slots.data_ptr(), rows.data_ptr(), item_table.data_ptr(), len(items),
            blocks.data_ptr(), 10,
        ]  # fmt: skip
        run(lib, "rotate", numbers, qkv, cos_sin, queries, keys, values, bias, q_norm, k_norm, stride)
        run(lib, "attend", numbers, queries, keys, values, q, planes, stride)
        return (q.view(first, -1, 32) * planes[:, 0, :, None]).view(first, heads, size)

    for s in range(6):
        if lengths[s] > news[s]:
            step([(s, 0, lengths[s] - news[s])])
    chunks = [(s, lengths[s] - news[s], lengths[s]) for s in range(6)]
    found = step(chunks)
    first = 0
    for s, a, b in chunks:
        parts = (all_qkv[s] + bias if extras else all_qkv[s]).double().view(lengths[s], -1, size)
        q, k, v = parts[:, :heads], parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]
        if extras:
            q, k = (torch.nn.functional.rms_norm(x, (size,), w.double(), 1e-6) for x, w in ((q, q_norm), (k, k_norm)))
        cos, sin = cos_sin[: lengths[s]].double().unsqueeze(1).split(size // 2, dim=-1)

        def turn(x: torch.Tensor) -> torch.Tensor:
            low, high = x.split(size // 2, dim=-1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)  # noqa: B023

        q, k, v = turn(q)[a:b], turn(k).bfloat16().double(), v.bfloat16().double()
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * size**-0.5
        far = torch.arange(a, b)[:, None] - torch.arange(lengths[s])
        hidden = (far < 0) | ((far >= window) if window else torch.zeros_like(far, dtype=torch.bool))
        expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
        error = (found[first : first + b - a] - expected).abs().max()
        assert error < 0.04, f"sequence {s}"
        alone = step([(s, a, b)])
        assert torch.equal(alone, found[first : first + b - a]), f"sequence {s}: bits depend on the batch"
        single = step([(s, b - 1, b)])
        assert torch.equal(single[0], found[first + b - a - 1]), f"sequence {s}: bits depend on the chunk"
        first += b - a


@pytest.mark.parametrize("bad", ["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_reaches_the_output(bad: str, number: float) -> None:
    """The runner sees it there and fails the request, which a softmax must not hide."""
    torch.manual_seed(0)
    shape = decoder.Shape(4, 2, 32, 1e-6, 0)
    lib = library(lambda m: decoder.attention(m, "attend", shape, 2))
    queries = torch.randn(2, 4 * 32).bfloat16()
    keys, values = (torch.randn(6, 2, 32, 32).bfloat16() for _ in range(2))
    {"query": queries[1, 32:64], "key": keys[3, 0].view(-1)[5:6], "value": values[3, 0].view(-1)[5:6]}[bad][0] = number
    positions, slots, rows = torch.tensor([149, 149]), torch.tensor([0, 0]), torch.tensor([0, 1], dtype=torch.int32)
    items = torch.tensor([[0, 1], [1, 1]], dtype=torch.int32)
    blocks = torch.tensor([[1, 2, 4, 5, 1], [1, 3, 4, 5, 2]], dtype=torch.int32)
    q, planes = torch.zeros(2, 4 * 32, dtype=torch.int8), torch.zeros(2, 3, 4)
    numbers = [2, 0, *(t.data_ptr() for t in (positions, slots, rows, items)), 2, blocks.data_ptr(), 5]
    run(lib, "attend", numbers, queries, keys, values, q, planes, 2 * keys.stride(0))
    assert planes[0, 0].isfinite().all()
    if bad == "key" and (queries[1].view(4, 32)[:2, 1] * number == float("-inf")).all():
        return  # such a key weighs nothing
    assert not planes[1, 0].isfinite().all()


def test_a_key_stands_for_the_text(tmp_path: Path) -> None:
    """With the same key the kernels are not even written again; with another one they are."""
    written = []

    def make() -> ir.Module:
        written.append(len(written))
        module = ir.Module("test")
        linear.quantise_rows(module, "f", 32)
        return module

    for key in ("a", "a", "b", "a"):
        assert Library(make, cache=tmp_path, key=key).address("f")
    assert written == [0, 1]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_object_in_the_cache_is_compiled_again(tmp_path: Path) -> None:
    def make() -> ir.Module:
        module = ir.Module("test")
        linear.quantise_rows(module, "f", 32)
        return module

    assert Library(make, cache=tmp_path).address("f")
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:100] + b"x" + whole[101:]):
        kept.write_bytes(damaged)
        assert Library(make, cache=tmp_path).address("f")
        assert kept.read_bytes() == whole
