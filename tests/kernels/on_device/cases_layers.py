"""Norm, activation, rotary positions with the cache write, and the bookkeeping of a step against their twins."""

import pytest
import torch
from far_blocks import far_cache
from octavo_kernels import (
    enter_blocks_reference,
    find_broken_reference,
    fused_add_rms_norm_reference,
    invariant_linear_reference,
    rope_and_cache_reference,
    row_linear_reference,
    silu_and_mul_reference,
    step_inputs_reference,
)
from octavo_kernels.activation_triton import silu_and_mul_triton
from octavo_kernels.invariant_triton import invariant_linear_triton
from octavo_kernels.norm_triton import fused_add_rms_norm_triton
from octavo_kernels.rope_triton import rope_and_cache_triton
from octavo_kernels.row_triton import row_linear_triton
from octavo_kernels.steps_triton import enter_blocks_triton, find_broken_triton, step_inputs_triton

NAN = float("nan")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}  # one unit in the last place, or two


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    tolerance = TOLERANCE[dtype or expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (7, 96), (3, 2049), (2, 5120)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_fused_add_rms_norm(device, rows, columns, with_residual, dtype) -> None:
    x = (3 * torch.randn(rows, columns + 5)).to(device, dtype)[:, :columns]
    residual = torch.randn(rows, columns).to(device, dtype) if with_residual else None
    weight = torch.randn(columns).to(device, dtype)
    before = x.clone()
    expected, hidden = fused_add_rms_norm_reference(x, residual, weight, 1e-5)
    actual, new_hidden = fused_add_rms_norm_triton(x, residual, weight, 1e-5)
    close(actual, expected)
    if device.type == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates where a GPU rounds to nearest
        close(new_hidden, hidden)
    else:
        assert torch.equal(new_hidden, hidden)
    assert torch.equal(x, before)
    assert (new_hidden is x) == (residual is None)


def test_fused_add_rms_norm_into_its_input(device) -> None:
    x, residual, weight = torch.randn(3, 5, 128, device=device).unbind(0)
    expected, hidden = fused_add_rms_norm_reference(x, residual, weight[0], 1e-6)
    actual, new_hidden = fused_add_rms_norm_triton(x, residual, weight[0], 1e-6, out=x)
    assert actual is x
    close(x, expected)
    assert torch.equal(new_hidden, hidden)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 100), (3, 1025)])
def test_silu_and_mul(device, rows, columns, dtype) -> None:
    x = (20 * torch.randn(rows, 2 * columns + 3)).to(device, dtype)[:, : 2 * columns]
    x[0, 0] = -200.0  # exp overflows: the result is 0, not NaN
    close(silu_and_mul_triton(x), silu_and_mul_reference(x))
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    assert silu_and_mul_triton(x, out) is out
    close(out, silu_and_mul_reference(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", ["none", "both", "k"])
@pytest.mark.parametrize(("size", "rotated"), [(64, 64), (96, 96), (128, 128), (128, 32), (80, 48), (256, 256)])
def test_rope_and_cache(device, size, rotated, norms, dtype) -> None:
    tokens, heads, kv_heads, block = 6, 5, 3, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size).to(device, dtype)
    angles = torch.rand(50, rotated // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
    positions = torch.tensor([0, 49, 7, 7, 20, 3], device=device)
    slots = torch.tensor([17, 0, -1, 47, 16, -1], device=device)
    q_norm = torch.randn(size).to(device, dtype) if norms == "both" else None
    k_norm = torch.randn(size).to(device, dtype) if norms != "none" else None
    results = []
    for function in (rope_and_cache_reference, rope_and_cache_triton):
        k_cache, v_cache = torch.full((2, 3, kv_heads, block, size), NAN, dtype=dtype, device=device)
        before = qkv.clone()
        q = function(
            qkv, cos_sin, positions, slots, k_cache, v_cache, heads, kv_heads, q_norm=q_norm, k_norm=k_norm, eps=1e-5
        )
        assert torch.equal(qkv, before)
        results.append((q, k_cache, v_cache))
    for expected, actual in zip(*results, strict=True):
        close(actual, expected, torch.bfloat16 if dtype == torch.bfloat16 else None)
    written = torch.isfinite(results[1][1]).all(dim=-1).all(dim=1).flatten().nonzero().flatten().tolist()
    assert written == [0, 16, 17, 47]  # the padding's slot -1 is nowhere, least of all in the last one


def test_rope_and_cache_passes_values_through_whatever_they_hold(device) -> None:
    """An infinite value is copied, not turned into NaN by a rotation which is not meant for it."""
    qkv = torch.zeros(1, 3 * 16, device=device)
    qkv[0, 32:] = float("inf")
    k_cache, v_cache = torch.zeros(2, 1, 1, 16, 16, device=device)
    cos_sin = torch.rand(4, 16, device=device)
    one = torch.tensor([1], device=device)
    rope_and_cache_triton(qkv, cos_sin, one, one, k_cache, v_cache, 1, 1)
    assert torch.isinf(v_cache[0, 0, 1]).all()
    assert (k_cache == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "rotated"), [(64, 64), (80, 48), (256, 256)])
def test_rope_and_fp8_cache(device, size, rotated, dtype) -> None:
    """Stored are the quotients by each head's scale, rounded to even and never beyond 448. A sum in another order may
    turn a rotated key to a neighbouring number of FP8; a value has no such excuse."""
    tokens, heads, kv_heads, block = 40, 3, 3, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size).to(device, dtype)
    qkv[3, ::2], qkv[4, -1], qkv[4, -2] = 1e5, float("inf"), -float("inf")
    angles = torch.rand(50, rotated // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
    positions = torch.randint(0, 50, (tokens,), device=device)
    slots = torch.randperm(4 * block)[:tokens].to(device)
    slots[7] = -1
    scales = torch.tensor([[0.01, 0.5, 3e-4], [2.0**-7, 1.0, 2.0**-9]], device=device)
    results = []
    for function in (rope_and_cache_reference, rope_and_cache_triton):
        k_cache, v_cache = torch.zeros(2, 4, kv_heads, block, size, dtype=torch.float8_e4m3fn, device=device)
        q = function(qkv, cos_sin, positions, slots, k_cache, v_cache, heads, kv_heads, kv_scales=scales)
        results.append((q, k_cache, v_cache))
    (expected_q, expected_k, expected_v), (q, k, v) = results
    ordinary = [n for n in range(tokens) if n not in (3, 4)]
    close(q[ordinary], expected_q[ordinary])
    assert torch.equal(v.view(torch.uint8), expected_v.view(torch.uint8))
    assert (k.view(torch.uint8) != expected_k.view(torch.uint8)).float().mean() < 0.01
    torch.testing.assert_close(k.float(), expected_k.float(), atol=2.0**-9, rtol=2.0**-3)
    assert k.float().abs().max() == v.float().abs().max() == 448
    heads_of = qkv.view(tokens, -1, size)[:, heads + kv_heads :].float()
    plain = (heads_of / scales[1][:, None]).clamp(-448, 448)
    written = slots >= 0
    stored = v[slots[written] // block, :, slots[written] % block].float()
    torch.testing.assert_close(stored, plain[written], atol=2.0**-10, rtol=2.0**-4)


def test_a_nan_stays_one_in_an_fp8_cache(device) -> None:
    """Or nobody would find out that a sequence is broken."""
    qkv = torch.ones(1, 3 * 16, device=device)
    qkv[0, 16], qkv[0, 40] = NAN, NAN
    k_cache, v_cache = torch.zeros(2, 1, 1, 16, 16, dtype=torch.float8_e4m3fn, device=device)
    one = torch.tensor([1], device=device)
    scales = torch.ones(2, 1, device=device)
    rope_and_cache_triton(qkv, torch.ones(4, 16, device=device), one, one, k_cache, v_cache, 1, 1, kv_scales=scales)
    assert k_cache[0, 0, 1].isnan().nonzero().flatten().tolist() == [0, 8]
    assert v_cache[0, 0, 1].isnan().nonzero().flatten().tolist() == [8]


def test_rope_and_cache_writes_beyond_2_to_the_31_elements(device) -> None:
    tokens, heads, kv_heads, block, size = 6, 5, 2, 16, 64
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size).to(device, dtype)
    cos_sin = torch.rand(50, size, device=device)
    positions = torch.tensor([0, 49, 7, 7, 20, 3], device=device)
    slots = torch.tensor([17, 0, -1, 47, 16, 33], device=device)
    near = torch.zeros(2, 3, kv_heads, block, size, dtype=dtype, device=device)
    expected = rope_and_cache_triton(qkv, cos_sin, positions, slots, *near, heads, kv_heads)
    both = far_cache(device, dtype, (kv_heads, block, size))
    far = both[-3:]
    assert both.stride(0) * (len(both) - 3) >= 2**31
    far.zero_()
    far_slots = torch.where(slots < 0, slots, slots + (len(both) - 3) * block)
    found = rope_and_cache_triton(qkv, cos_sin, positions, far_slots, both[:, 0], both[:, 1], heads, kv_heads)
    assert torch.equal(found, expected)
    assert torch.equal(far.transpose(0, 1), near)
    assert near[:, :, :, 1].any(), "nothing was written: a weak test"


@pytest.mark.parametrize("padding", [0, 5, 300])
@pytest.mark.parametrize("counts", [[1], [1, 1, 1, 1], [3, 0, 70, 1, 0, 0, 200, 1], [0, 0, 2, 0], [0], []])
def test_step_inputs(device, counts, padding) -> None:
    batch, rows, longest, block = len(counts), 11, 256, 16
    tokens = torch.randint(0, 2**31 - 1, (rows, longest), dtype=torch.int32, device=device)
    table = torch.randint(0, 2**27, (rows, longest // block), dtype=torch.int32, device=device)  # slots above 2^31
    row = torch.randperm(rows)[:batch].to(device, torch.int32)
    starts = torch.tensor([(37 * b) % 56 for b in range(batch)], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    arguments = (row, starts, bounds, tokens, table, block)
    total = sum(counts) + padding
    out = tuple(torch.full((total,), 99, device=device) for _ in range(3))
    expected = step_inputs_reference(*arguments, total=total)
    for actual in (step_inputs_triton(*arguments, total=total), step_inputs_triton(*arguments, total=total, out=out)):
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("count", [0, 3, 300])
def test_enter_blocks(device, count) -> None:
    """Also updates that are padding, whose columns and blocks mean nothing."""
    table = torch.randint(0, 99, (40, 50), dtype=torch.int32, device=device)
    places = torch.randperm(40 * 50, device=device)[:count].to(torch.int32)
    rows, columns = places // 50, places % 50
    rows[::3], columns[::3] = -1, 10**6
    blocks = torch.arange(1000, 1000 + count, dtype=torch.int32, device=device)
    expected = table.clone()
    enter_blocks_reference(expected, rows, columns, blocks)
    enter_blocks_triton(table, rows, columns, blocks)
    assert torch.equal(table, expected)
    assert (table >= 1000).sum() == (rows >= 0).sum()


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_find_broken(device, dtype, bad) -> None:
    counts = torch.tensor([1, 0, 5, 1, 1, 30, 2, 0])
    query_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device, torch.int32)
    states = torch.randn(44, 100).to(device, dtype)[:, :97]
    states[40:] = NAN  # padding
    out = torch.full((8,), 7, dtype=torch.int32, device=device)
    assert find_broken_triton(states, query_start, out) is out
    assert out.tolist() == [0] * 8
    states[5, 96] = states[6, 0] = states[37, 50] = states[39, 1] = bad
    found = find_broken_triton(states, query_start, out).tolist()
    assert found == [0, 0, 1, 1, 0, 1, 1, 0]
    assert find_broken_reference(states[:40], query_start, out).tolist() == found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 6), (100, 33), (2304, 10)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_row_linear(device, inputs, outputs, gated, extras, dtype) -> None:
    x = torch.randn(1, inputs).to(device, dtype)
    weight = (torch.randn(outputs * (1 + gated), inputs) * inputs**-0.5).to(device, dtype)
    bias = torch.randn(len(weight)).to(device, dtype) if extras else None
    norm = torch.randn(inputs).to(device, dtype) if extras else None
    residual = torch.randn(1, outputs).to(device, dtype) if extras else None
    options = {"norm": norm, "eps": 1e-5, "gated": gated, "residual": residual}
    expected = row_linear_reference(x, weight, bias, **options)
    close(row_linear_triton(x, weight, bias, **options), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 20), (100, 33), (576, 130)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_invariant_linear(device, inputs, outputs, with_bias, dtype) -> None:
    x = torch.randn(130, inputs + 3).to(device, dtype)[:, :inputs]
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(device, dtype)
    bias = torch.randn(outputs).to(device, dtype) if with_bias else None
    for rows in (1, 5, 130):
        wanted, tolerance = invariant_linear_reference(x[:rows], weight, bias), max(TOLERANCE[dtype], 1e-5)  # long sums
        found = invariant_linear_triton(x[:rows], weight, bias)
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    assert invariant_linear_triton(x[:0], weight).shape == (0, outputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 4096), (1536, 1000), (3072, 1024), (1000, 20000)])
def test_rows_of_invariant_linear_are_what_they_are_alone(device, inputs, outputs, dtype) -> None:
    """To the bit on a GPU, with tiles of every kind. The interpreter's products are numpy's."""
    if device.type == "cpu":
        inputs, outputs = inputs // 8, outputs // 40
    weight, bias = torch.randn(outputs, inputs).to(device, dtype), torch.randn(outputs).to(device, dtype)
    x = torch.randn(3000 if device.type == "cuda" else 140, inputs).to(device, dtype)
    wanted = invariant_linear_triton(x, weight, bias)
    for begin, end in ((0, 1), (7, 9), (0, 64), (3, 68), (1, 130), (100, 400), (0, 1111)):
        found = invariant_linear_triton(x[begin:end], weight, bias)
        if device.type == "cuda":
            assert torch.equal(found, wanted[begin:end]), (begin, end)
        else:
            close(found, wanted[begin:end])
