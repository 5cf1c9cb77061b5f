"""Rows as bytes and back, on the CPU: the kernels against their twins."""

from __future__ import annotations

import pytest
import torch
from octavo_kernels.cpu.compiler import available

pytestmark = pytest.mark.skipif(not available(), reason="needs AVX512-VNNI, AVX512-BF16 and llvmlite")

if available():
    from octavo_kernels.cpu.byte_rows import (
        quantise_rows,
        quantise_rows_reference,
        scale_rows,
        scale_rows_reference,
    )

TYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("inputs", [16, 48, 1024])
def test_rows_become_bytes_as_the_twin_makes_them(inputs: int, dtype: torch.dtype) -> None:
    x = (torch.randn(9, inputs) * torch.logspace(-6, 6, 9)[:, None]).to(dtype)
    x[4] = 0
    found, scales = quantise_rows(x)
    expected, expected_scales = quantise_rows_reference(x)
    assert torch.equal(scales, expected_scales)
    assert (found.int() - expected.int()).abs().max() <= 1  # where the product lies on a half
    assert (found != expected).float().mean() < 1e-3
    assert found[4].eq(128).all()
    assert scales[4] == 0
    back = (found.float() - 128) * scales[:, None]
    assert ((back - x.float()).abs() <= 0.501 * scales[:, None]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_shows_it(bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 40] = bad
    scales = quantise_rows(x)[1]
    assert scales.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("outputs", [16, 5, 206, 1024])
def test_sums_become_numbers_as_the_twin_makes_them(outputs: int, dtype: torch.dtype, biased: bool, relu: bool) -> None:
    sums = torch.randn(7, outputs) * 1000
    sums[2, outputs - 1] = float("nan")
    scales, bias = torch.rand(7), torch.randn(outputs) * 100 if biased else None
    expected = scale_rows_reference(sums, scales, bias, dtype, relu=relu)
    found = scale_rows(sums, scales, bias, dtype, relu=relu)
    assert found.dtype == dtype
    assert (found.data_ptr() == sums.data_ptr()) == (dtype == torch.float32)
    exact = 1e-6 if dtype == torch.float32 else 1 / 128  # the last bit: the kernel rounds once
    torch.testing.assert_close(found, expected, rtol=exact, atol=1e-4, equal_nan=True)
    assert found[2, -1].isnan()
