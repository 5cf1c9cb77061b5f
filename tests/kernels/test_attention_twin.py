"""The attention oracle itself, against torch's scaled_dot_product_attention on keys gathered one token at a time."""

import pytest
import torch
import torch.nn.functional as F
from octavo_kernels import paged_attention


def batch(sequences, heads, kv_heads, size, block, dtype=torch.float32):
    torch.manual_seed(3)
    needed = [-(-length // block) for _, length in sequences]
    cache = torch.randn(2, sum(needed) + 1, kv_heads, block, size).to(dtype)
    cache[:, 0] = float("nan")
    table = torch.zeros(len(sequences), max(needed), dtype=torch.int32)
    order = (torch.randperm(sum(needed)) + 1).to(torch.int32)
    for b, blocks in enumerate(order.split(needed)):
        table[b, : len(blocks)] = blocks
        last = sequences[b][1] - (needed[b] - 1) * block
        cache[:, blocks[-1], :, last:] = float("nan")
    starts = torch.tensor([0, *(count for count, _ in sequences)]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([length for _, length in sequences], dtype=torch.int32)
    q = torch.randn(int(starts[-1]), heads, size).to(dtype)
    return q, cache[0], cache[1], table, starts, lengths


def by_sdpa(q, k_cache, v_cache, table, starts, lengths, scale, window, slopes=None):
    block, group = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    rows = []
    for b, length in enumerate(lengths.tolist()):
        slots = [(int(table[b, p // block]), p % block) for p in range(length)]
        k = torch.stack([k_cache[i, :, j] for i, j in slots], dim=1)
        v = torch.stack([v_cache[i, :, j] for i, j in slots], dim=1)
        part = q[int(starts[b]) : int(starts[b + 1])].transpose(0, 1)
        first = length - part.shape[1]
        mask = torch.tensor([
            [p <= first + i and (window == 0 or first + i - p < window) for p in range(length)]
            for i in range(part.shape[1])
        ])  # fmt: skip
        if slopes is not None:
            steps = torch.arange(length)[None, :] - torch.arange(first, length)[:, None]
            mask = (slopes[:, None, None] * steps).masked_fill(~mask, -torch.inf)
        k, v = (tensor.repeat_interleave(group, dim=0) for tensor in (k, v))
        rows.append(F.scaled_dot_product_attention(part, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(rows)


SEQUENCES = [(1, 33), (7, 7), (1, 1), (5, 40), (16, 32)]


@pytest.mark.parametrize("window", [0, 1, 9])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "block"), [(4, 4, 64, 16), (8, 2, 96, 32), (7, 1, 32, 8)])
def test_reference_is_torch_attention(heads, kv_heads, size, block, window) -> None:
    arguments = batch(SEQUENCES, heads, kv_heads, size, block)
    expected = by_sdpa(*arguments, scale=0.2, window=window)
    actual = paged_attention(*arguments, max_query_len=16, max_seq_len=40, scale=0.2, window=window)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (7, 1)])
def test_alibi_is_torch_attention_with_a_bias(heads, kv_heads, window) -> None:
    arguments = batch(SEQUENCES, heads, kv_heads, 32, 8)
    slopes = 2.0 ** -torch.arange(heads, dtype=torch.float32)
    expected = by_sdpa(*arguments, scale=0.2, window=window, slopes=slopes)
    actual = paged_attention(
        *arguments, max_query_len=16, max_seq_len=40, scale=0.2, window=window, alibi_slopes=slopes
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_alibi_comes_after_the_soft_cap_by_hand() -> None:
    q, k, v, table, starts, lengths = batch([(1, 2)], 1, 1, 2, 2)
    keys, values = k[table[0, 0], 0], v[table[0, 0], 0]
    scores = 3 * torch.tanh(4 * (keys @ q[0, 0]) / 3) + 0.7 * torch.tensor([-1.0, 0.0])
    actual = paged_attention(
        q, k, v, table, starts, lengths, max_query_len=1, max_seq_len=2, scale=4.0, soft_cap=3.0,
        alibi_slopes=torch.tensor([0.7]),
    )  # fmt: skip
    torch.testing.assert_close(actual[0, 0], scores.softmax(0) @ values)


def test_an_fp8_cache_is_its_numbers_times_the_scales() -> None:
    q, k, v, table, starts, lengths = batch(SEQUENCES, 6, 2, 32, 8)
    scales = torch.tensor([[0.3, 0.01], [1.7, 0.5]])
    k8, v8 = ((c / s[:, None, None]).to(torch.float8_e4m3fn) for c, s in zip((k, v), scales, strict=True))
    wide = [c.float() * s[:, None, None] for c, s in zip((k8, v8), scales, strict=True)]
    expected = by_sdpa(q, *wide, table, starts, lengths, scale=0.2, window=0)
    actual = paged_attention(
        q, k8, v8, table, starts, lengths, max_query_len=16, max_seq_len=40, scale=0.2, kv_scales=scales
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_soft_cap_by_hand() -> None:
    """One query, two keys: the weights are those of the capped scores."""
    q, k, v, table, starts, lengths = batch([(1, 2)], 1, 1, 2, 2)
    keys, values = k[table[0, 0], 0], v[table[0, 0], 0]
    scores = 3 * torch.tanh(4 * (keys @ q[0, 0]) / 3)
    expected = scores.softmax(0) @ values
    actual = paged_attention(
        q, k, v, table, starts, lengths, max_query_len=1, max_seq_len=2, scale=4.0, soft_cap=3.0
    )  # fmt: skip
    torch.testing.assert_close(actual[0, 0], expected)


def test_bf16_and_out() -> None:
    arguments = batch(SEQUENCES, 4, 2, 64, 16, torch.bfloat16)
    out = torch.full_like(arguments[0], 9)
    wide = [tensor.float() if tensor.is_floating_point() else tensor for tensor in arguments]
    result = paged_attention(*arguments, max_query_len=16, max_seq_len=40, scale=0.1, out=out)
    assert result is out
    expected = paged_attention(*wide, max_query_len=16, max_seq_len=40, scale=0.1)
    torch.testing.assert_close(out, expected.bfloat16(), atol=0, rtol=0)
