"""The best logits of a head, span by span, are the best of all its logits."""

from __future__ import annotations

import pytest
import torch
from octavo.execute.rows import best_of
from octavo.layers import head
from octavo.layers.byte_linear import byte_product
from octavo.layers.linear import product_with
from octavo_kernels.cpu.compiler import available


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_best_are_the_best_of_all_logits(kind: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "int8" and not available():
        pytest.skip("needs AVX512-VNNI, AVX512-BF16 and llvmlite")
    monkeypatch.setattr(head, "SPAN", 96)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    weight, states = torch.randn(1003, 64).to(dtype), torch.randn(6, 64).to(dtype)
    bias = torch.randn(1003).to(dtype) * 5 if biased else None
    made = head.head_of(weight, bias, byte_product if kind == "int8" else product_with)
    with torch.inference_mode():
        logits, found = made.logits(states), made.best(states, 7)
        expected = best_of(logits, 7)
    plain = states.float() @ weight.float().T + (0 if bias is None else bias.float())
    assert (logits.float() - plain).norm() / plain.norm() < 0.02
    torch.testing.assert_close(found.values.float(), expected.values.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.float().gather(1, found.tokens), found.values.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.sums, expected.sums, atol=1e-4, rtol=1e-5)
