"""Which launches of a kernel are one to `octavo_kernels.ahead`: as many as Triton would compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from octavo_kernels.ahead import _form
from octavo_kernels.attention_triton import join_splits_kernel
from octavo_kernels.gumbel_triton import best_of_tile_kernel
from octavo_kernels.norm_triton import add_rms_norm_kernel

FLOATS, INTS = torch.zeros(64), torch.zeros(64, dtype=torch.int32)


def norm(columns: int = 64, eps: float = 1e-6, x: torch.Tensor = FLOATS, **options: Any) -> Any:
    args = (x, FLOATS, FLOATS, FLOATS, FLOATS, 64, 64, 64, columns, eps)
    return _form(add_rms_norm_kernel, args, {"HAS_RESIDUAL": True, "TILE": 64, "EARLY": False} | options)


def join(slots: int, out: torch.Tensor = FLOATS, **constants: Any) -> Any:
    args = (FLOATS, FLOATS, FLOATS, INTS, INTS, out, 1, slots, 64, 64, 256, 0)
    return _form(join_splits_kernel, args, {"HEAD_SIZE": 64, "MAX_SPLITS": 32} | constants)


def test_numbers_that_are_not_specialised_on_make_no_difference() -> None:
    assert join(1) == join(2) == join(16) == join(32)
    assert join(2) != join(2**31)
    longs = torch.zeros(64, dtype=torch.int64)
    unaligned = [_form(best_of_tile_kernel, (FLOATS, FLOATS, longs, at, FLOATS, INTS, 300, 300), {"TILE": 64})
                 for at in (longs, longs[1:])]  # fmt: skip
    assert unaligned[0] == unaligned[1]


def test_what_triton_specialises_on_does() -> None:
    assert norm(eps=1e-5) == norm()
    assert norm(100) == norm(7)
    assert len({norm(1), norm(7), norm(64)}) == 3
    assert norm(x=FLOATS.bfloat16()) != norm()
    assert norm(x=FLOATS[1:]) != norm()
    assert norm(TILE=128) != norm()
    assert norm(num_warps=8) != norm()
    assert join(2, MAX_SPLITS=16) != join(2)
    assert join(2)[0] != norm()[0]
