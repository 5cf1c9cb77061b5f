"""The highest logits and the sums of a row, found without a copy of all logits in float32, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from octavo.execute.rows import SPAN, highest, log_sums

SIZES = (5, SPAN, 3 * SPAN, 9 * SPAN + 1, 40 * SPAN - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_highest_in_order(size: int, dtype: torch.dtype) -> None:
    """Wherever they stand: also several in one span, and in the rest behind the last whole one."""
    torch.manual_seed(size)
    values = torch.randn(7, size).to(dtype)
    values[0] = torch.arange(size)  # the last places
    values[1] = -torch.arange(size).float()  # the first
    values[2] = float("-inf")  # nothing is possible, except two
    values[2, [size // 2, size - 1]] = 1.0
    for count in (1, 2, 5):
        best, places = highest(values, count)
        assert torch.equal(best, values.topk(count, dim=1).values)
        assert torch.equal(values.gather(1, places), best)
        assert all(len(set(row.tolist())) == count for row in places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(9, 50_000) * 8).to(dtype)
    found = log_sums(logits)
    torch.testing.assert_close(found.double(), torch.logsumexp(logits.double(), dim=1), rtol=1e-6, atol=0)
    assert torch.equal(torch.cat([log_sums(row[None]) for row in logits]), found)
    assert torch.equal(log_sums(logits[:, ::2]), log_sums(logits[:, ::2].contiguous()))
