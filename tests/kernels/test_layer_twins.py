"""The twins of norm, activation, rotary positions and step inputs against plain restatements, and refused arguments."""

import math
import subprocess
import sys
from pathlib import Path

import octavo_kernels as ok
import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_that_of_torch_on_the_rounded_sum(dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.randn(96).to(dtype)
    normed, hidden = ok.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(hidden, x + residual)
    expected = F.rms_norm(hidden.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), expected, atol=1e-6, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5)
    alone, same = ok.fused_add_rms_norm(hidden, None, weight, 1e-5)
    assert same is hidden
    assert torch.equal(alone, normed)


def test_eps_counts_where_the_input_is_small() -> None:
    normed, _ = ok.fused_add_rms_norm(torch.full((1, 4), 1e-3), None, torch.ones(4), 3e-6)
    torch.testing.assert_close(normed, torch.full((1, 4), 0.5))


def test_silu_and_mul_takes_the_gate_first() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0, 5.0, 7.0, 3.0]])
    expected = torch.tensor([[0.0, 7 / (1 + 2.718281828459045**-1), -6 / (1 + 2.718281828459045**2)]])
    torch.testing.assert_close(ok.silu_and_mul(x), expected)
    out = torch.empty(1, 3)
    assert ok.silu_and_mul(x, out) is out


@pytest.mark.parametrize(("size", "rotated"), [(8, 8), (12, 4)])
def test_rope_turns_pairs_as_complex_numbers(size, rotated) -> None:
    """Dimension i and i + rot_dim / 2 are the real and the imaginary part of a number turned by its angle."""
    torch.manual_seed(0)
    heads, kv_heads, block = 3, 2, 4
    angle = torch.rand(20, rotated // 2) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1)
    qkv = torch.randn(5, (heads + 2 * kv_heads) * size)
    positions, slots = torch.tensor([3, 0, 19, 3, 7]), torch.tensor([0, 9, -1, 7, 4])
    k_cache, v_cache = torch.full((2, 3, kv_heads, block, size), -7.0)
    weight = torch.rand(size) + 0.5
    q = ok.rope_and_cache(
        qkv, cos_sin, positions, slots, k_cache, v_cache, heads, kv_heads, q_norm=weight, k_norm=2 * weight, eps=1e-5
    )
    parts = qkv.view(5, -1, size)

    def turn(vectors: torch.Tensor, token: int, scale: torch.Tensor) -> torch.Tensor:
        vectors = F.rms_norm(vectors, (size,), scale, 1e-5)
        number = torch.complex(vectors[:, : rotated // 2], vectors[:, rotated // 2 : rotated])
        number = number * torch.polar(torch.ones(rotated // 2), angle[positions[token]])
        return torch.cat([number.real, number.imag, vectors[:, rotated:]], dim=1)

    written = torch.zeros(12, dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        torch.testing.assert_close(q[token], turn(parts[token, :heads], token, weight))
        if slot >= 0:
            written[slot] = True
            place = (slot // block, slice(None), slot % block)
            keys = turn(parts[token, heads : heads + kv_heads], token, 2 * weight)
            torch.testing.assert_close(k_cache[place], keys)
            assert torch.equal(v_cache[place], parts[token, heads + kv_heads :])
    for cache in (k_cache, v_cache):
        untouched = (cache.transpose(1, 2).reshape(12, -1) == -7).all(dim=1)
        assert torch.equal(untouched, ~written)


@pytest.mark.parametrize("contiguous", [True, False])
def test_rope_with_the_lookups_of_a_step_done_before(contiguous) -> None:
    torch.manual_seed(0)
    angle = torch.rand(20, 4) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1)
    qkv, positions, slots = torch.randn(4, 7 * 12), torch.tensor([3, 0, 19, 7]), torch.tensor([5, -1, 9, 0])
    caches = torch.full((2, 2, 3, 2, 4, 12), -7.0)
    if not contiguous:
        caches = torch.full((2, 2, 3, 4, 2, 12), -7.0).transpose(3, 4)
    step = ok.prepare_rope(cos_sin, positions, slots, caches[0, 0])
    assert step is not None
    plain = ok.rope_and_cache(qkv, cos_sin, positions, slots, *caches[0], 3, 2)
    prepared = ok.rope_and_cache(qkv, cos_sin, positions, slots, *caches[1], 3, 2, step=step)
    assert torch.equal(plain, prepared)
    assert torch.equal(caches[0], caches[1])
    assert (caches[0].transpose(2, 3).reshape(2, 12, -1) != -7).all(dim=2).sum() == 6


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [1], [0, 0], []])
def test_step_inputs_by_a_loop(counts) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 9999, (6, 40), dtype=torch.int32)
    table = torch.randint(0, 500, (6, 10), dtype=torch.int32)
    rows = torch.randperm(6)[: len(counts)].to(torch.int32)
    starts = torch.arange(len(counts), dtype=torch.int32) * 7
    bounds = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    expected = [(0, 0, -1)] * (sum(counts) + 2)
    for b, count in enumerate(counts):
        for j in range(count):
            p, row = int(starts[b]) + j, int(rows[b])
            expected[int(bounds[b]) + j] = (int(tokens[row, p]), p, int(table[row, p // 4]) * 4 + p % 4)
    result = ok.step_inputs(rows, starts, bounds, tokens, table, 4, total=len(expected))
    assert [tuple(entry) for entry in torch.stack(result, dim=1).tolist()] == expected
    assert all(tensor.dtype == torch.int64 for tensor in result)


@pytest.mark.parametrize("bias", [False, True])
def test_row_linear_is_the_operators_it_takes_the_place_of(bias) -> None:
    x, residual, norm = torch.randn(1, 96), torch.randn(1, 64), torch.randn(96)
    weight, offset = torch.randn(128, 96) / 10, torch.randn(128) if bias else None
    normed, _ = ok.fused_add_rms_norm(x, None, norm, 1e-5)
    plain = torch.nn.functional.linear(normed, weight, offset)
    torch.testing.assert_close(ok.row_linear(x, weight, offset, norm=norm, eps=1e-5), plain)
    gated = ok.row_linear(x, weight, offset, norm=norm, eps=1e-5, gated=True, residual=residual)
    torch.testing.assert_close(gated, ok.silu_and_mul(plain) + residual)


@pytest.mark.parametrize("contiguous", [True, False])
def test_an_fp8_cache_holds_quotients_by_the_scales(contiguous) -> None:
    """Large ones saturate, a NaN stays; where nothing was written there are zeros still."""
    keys, values = torch.tensor([[3.0, 1000.0], [-0.3, 50.0]]), torch.tensor([[-8.0, -1e30], [0.001, math.nan]])
    qkv = torch.cat([torch.zeros(2, 2), keys, values], dim=1)
    cos_sin = torch.tensor([[1.0, 0.0]])  # no rotation
    both = torch.zeros(3, 2, 1, 4, 2, dtype=torch.float8_e4m3fn)
    caches = both.unbind(1) if not contiguous else both.transpose(0, 1).contiguous().unbind(0)
    scales = torch.tensor([[0.5], [0.01]])
    zeros, slots = torch.zeros(2, dtype=torch.int64), torch.tensor([9, 2])
    ok.rope_and_cache(qkv, cos_sin, zeros, slots, *caches, 1, 1, kv_scales=scales)
    wanted = [[6.0, 448], [-0.6, 100.0]], [[-448, -448], [0.1, math.nan]]
    for cache, expected in zip(caches, wanted, strict=True):
        stored = cache.float()
        assert stored.count_nonzero() == 4
        torch.testing.assert_close(
            torch.stack([stored[2, 0, 1], stored[0, 0, 2]]), torch.tensor(expected), atol=0, rtol=2.0**-4,
            equal_nan=True,
        )  # fmt: skip


X = torch.zeros(2, 8)
INTS, LONGS, CACHE = torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.zeros(1, 1, 16, 2)
EIGHT_BITS = CACHE.to(torch.float8_e4m3fn)
REFUSED = {
    "residual": lambda: ok.fused_add_rms_norm(X, X[:1], X[0], 1e-6),
    "weight": lambda: ok.fused_add_rms_norm(X, None, X[0, :4], 1e-6),
    "out must not be x": lambda: ok.fused_add_rms_norm(X, None, X[0], 1e-6, out=X),
    "x has 7 columns": lambda: ok.silu_and_mul(torch.zeros(2, 7)),
    "x is torch.int32": lambda: ok.silu_and_mul(X.int()),
    "x must be contiguous": lambda: ok.silu_and_mul(torch.zeros(8, 2).T),
    "qkv has shape": lambda: ok.rope_and_cache(X, X, LONGS, LONGS, CACHE, CACHE, 4, 1),
    "cos_sin has 8 columns": lambda: ok.rope_and_cache(X, X, LONGS, LONGS, CACHE, CACHE, 2, 1),
    "slots is": lambda: ok.rope_and_cache(X, X[:, :2], LONGS, LONGS.int(), CACHE, CACHE, 2, 1),
    "v_cache": lambda: ok.rope_and_cache(X, X[:, :2], LONGS, LONGS, CACHE, CACHE.double(), 2, 1),
    "temperature": lambda: ok.gumbel_sample(X, X[0], LONGS, LONGS),
    "seeds is torch.int32": lambda: ok.gumbel_sample(X, X[:, 0].contiguous(), LONGS.int(), LONGS),
    "top_k is torch.int64": lambda: ok.top_k_top_p_min_p(X, torch.ones(2), LONGS, torch.ones(2), torch.ones(2)),
    "logits is": lambda: ok.top_k_top_p_min_p(X.half(), torch.ones(2), INTS[:2], torch.ones(2), torch.ones(2)),
    "allowed has shape": lambda: ok.forbid_tokens(X, LONGS, INTS[None]),
    "logits is torch.float16": lambda: ok.forbid_tokens(X.half(), LONGS, INTS[:2, None]),
    "rows is torch.int32": lambda: ok.forbid_tokens(X, INTS[:2], INTS[:2, None]),
    "block_size is 0": lambda: ok.step_inputs(INTS[:2], INTS[:2], INTS, INTS[None], INTS[None], 0, total=2),
    "query_start": lambda: ok.step_inputs(INTS[:2], INTS[:2], INTS[:2], INTS[None], INTS[None], 4, total=2),
    "temperature has shape": lambda: ok.draw_tokens(X, INTS[:2], INTS[:2], X[0], LONGS, INTS[None]),
    "positions is torch.int64": lambda: ok.draw_tokens(X, INTS[:2], LONGS, X[0], LONGS, INTS[None]),
    "columns has shape": lambda: ok.enter_blocks(INTS[None], INTS[:2], INTS, INTS[:2]),
    "blocks is torch.int64": lambda: ok.enter_blocks(INTS[None], INTS[:2], INTS[:2], LONGS),
    "out is torch.int64": lambda: ok.find_broken(X, INTS, LONGS),
    "weight is torch.float16": lambda: ok.row_linear(X[:1], X.half()),
    "an even number of rows": lambda: ok.row_linear(X[:1], torch.zeros(3, 8), gated=True),
    "x has shape": lambda: ok.row_linear(X, X),
    "3 heads and k_cache 2": lambda: attend(heads=3),
    "block_table has shape": lambda: attend(table=INTS[None]),
    "max_query_len": lambda: attend(max_query_len=0),
    "window": lambda: attend(window=-1),
    "shared_splits is for decoding": lambda: attend(window=4, shared_splits=INTS[:1]),
    "out has shape": lambda: attend(out=X),
    "shared_splits is .* without ALiBi": lambda: attend(shared_splits=INTS[:1], alibi_slopes=torch.ones(4)),
    "alibi_slopes has shape": lambda: attend(alibi_slopes=torch.ones(2)),
    "alibi_slopes is torch.int64": lambda: attend(alibi_slopes=torch.ones(4, dtype=torch.int64)),
    "kv_scales go with": lambda: attend(kv_scales=torch.ones(2, 2)),
    "kv_scales go .* it is torch.float8": lambda: attend(cached=torch.float8_e4m3fn),
    "kv_scales has shape": lambda: attend(cached=torch.float8_e4m3fn, kv_scales=torch.ones(2)),
    "kv_scales must be contiguous": lambda: attend(cached=torch.float8_e4m3fn, kv_scales=torch.ones(2, 2).T),
    "kv_scales is torch.float64": lambda: ok.rope_and_cache(
        X, X[:, :2], LONGS, LONGS, EIGHT_BITS, EIGHT_BITS, 2, 1, kv_scales=torch.ones(2, 1, dtype=torch.float64)
    ),
    "it is torch.float8": lambda: ok.rope_and_cache(X, X[:, :2], LONGS, LONGS, EIGHT_BITS, EIGHT_BITS, 2, 1),
}


def attend(heads=4, table=INTS[:2, None], max_query_len=1, cached=torch.float32, **options):
    cache = torch.zeros(1, 2, 16, 8, dtype=cached)
    return ok.paged_attention(
        torch.zeros(2, heads, 8), cache, cache, table, INTS, INTS[:2], max_query_len=max_query_len, max_seq_len=4,
        scale=1.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_argument_is_named(message) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_the_package_works_where_triton_is_not_installed() -> None:
    script = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
sys.modules["triton"] = None
import torch, octavo_kernels
x = torch.ones(2, 8)
assert octavo_kernels.silu_and_mul(x).shape == (2, 4)
assert not octavo_kernels._dispatch.use_triton(x)
"""
    path = str(Path(ok.__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": path}, timeout=120)


def test_a_cpu_tensor_goes_to_the_twin_and_imports_no_kernel() -> None:
    script = "import torch, octavo_kernels as k, sys; k.silu_and_mul(torch.ones(2, 8)); "
    script += "sys.exit(any(name.endswith('_triton') and 'octavo' in name for name in sys.modules))"
    path = str(Path(ok.__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": path}, timeout=120)
