"""What the host does of a step itself is what the operators do."""

from __future__ import annotations

import pytest
import torch
from octavo.execute.rows import host_step_inputs
from octavo_kernels.steps import step_inputs_reference


@pytest.mark.parametrize("counts", [[1], [9], [1, 1, 1], [1, 1, 4], [5, 1, 2], [2] * 6])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_inputs_of_a_step(counts: list[int], padding: int) -> None:
    torch.manual_seed(len(counts) + padding)
    tokens, table = (torch.randint(0, 9999, (6, size), dtype=torch.int32) for size in (80, 20))
    rows = torch.randperm(6)[: len(counts)].to(torch.int32)
    starts = torch.randint(0, 60, (len(counts),), dtype=torch.int32)
    ends = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    total = sum(counts) + padding
    found = host_step_inputs(rows, starts, ends, tokens, table, 4, total=total)
    for one, expected in zip(
        found, step_inputs_reference(rows, starts, ends, tokens, table, 4, total=total), strict=True
    ):
        assert one.dtype == torch.int64
        assert torch.equal(one, expected)
