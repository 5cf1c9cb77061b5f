"""The best logits and the sum of all, span by span: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from octavo_kernels.cpu.compiler import available

pytestmark = pytest.mark.skipif(not available(), reason="needs AVX512-VNNI, AVX512-BF16 and llvmlite")

if available():
    from octavo_kernels.cpu.best import Best, best_reference


def seen(
    logits: torch.Tensor, count: int, span: int, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    best, first = Best(len(logits), count), 0
    for part in torch.split(logits, span, dim=1):
        best.see(part.contiguous(), first, factors)
        first += part.shape[1]
    return best.values, best.tokens, best.log_sums()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [5, 16, 100, 512, 5000])
@pytest.mark.parametrize("count", [1, 8, 33])
def test_best_and_sums_are_those_of_all(count: int, span: int, dtype: torch.dtype) -> None:
    """In bfloat16 many are equal: the lower token goes first."""
    logits = (torch.randn(6, 3001) * torch.tensor([0.0, 0.1, 1, 5, 30, 200])[:, None] + 7).to(dtype)
    logits[3] = logits[3].sort().values  # each one is the highest so far
    logits[4] = logits[4].sort(descending=True).values
    values, tokens, sums = seen(logits, count, span)
    expected, expected_tokens, expected_sums = best_reference(logits, count)
    assert torch.equal(values, expected)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(sums, expected_sums, atol=2e-5, rtol=1e-6)


def test_fewer_tokens_than_asked_for() -> None:
    values, tokens, _ = seen(torch.tensor([[1.0, 3.0, 2.0]]), 5, 2)
    assert values.tolist() == [[3.0, 2.0, 1.0, float("-inf"), float("-inf")]]
    assert tokens[0, :3].tolist() == [1, 2, 0]


@pytest.mark.parametrize("place", [0, 17, 99, 116])
def test_a_row_that_is_broken_shows_it(place: int) -> None:
    logits = torch.randn(3, 117)
    logits[1, place] = float("nan")
    assert seen(logits, 4, 50)[2].isfinite().tolist() == [True, False, True]


def test_rows_with_factors() -> None:
    logits, factors = torch.randn(4, 1003), torch.tensor([0.0, 1e-3, 1.0, 7.0])
    values, tokens, sums = seen(logits, 6, 200, factors)
    expected, expected_tokens, expected_sums = best_reference(logits * factors[:, None], 6)
    assert torch.equal(values, expected)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(sums, expected_sums, atol=2e-5, rtol=1e-6)
