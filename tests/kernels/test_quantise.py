"""Rounding weights to blocks: how far off, what is exact, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from octavo_kernels.cpu.packed import pack
from octavo_kernels.cpu.quantise import BLOCK, quantise_q4, quantise_q8

Quantise = Callable[[torch.Tensor], torch.Tensor]
KINDS: dict[str, Quantise] = {"Q4_1": quantise_q4, "Q8_0": quantise_q8}


def bad_row(weight: torch.Tensor, kind: str) -> int | None:
    return pack(KINDS[kind](weight), kind, weight.shape[1]).first_bad_row()


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What another implementation of the format reads."""
    blocks = KINDS[kind](weight)
    assert bad_row(weight, kind) is None
    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind]).copy())


def from_minimum_to_maximum(weight: torch.Tensor) -> torch.Tensor:
    """The plain rule for Q4_1, with its scale and minimum in float16."""
    v = weight.view(-1, BLOCK)
    m = v.amin(1, keepdim=True).half().float()
    d = ((v.amax(1, keepdim=True) - m) / 15).half().float()
    return (((v - m) / d).round().clamp(0, 15) * d + m).view_as(weight)


def random(kind: str, rows: int = 300, columns: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(rows, columns)
    values.normal_(generator=generator) if kind == "normal" else values.uniform_(-1, 1, generator=generator)
    return values**3 if kind == "long tails" else values


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.02, 1.0, 1000.0])
@pytest.mark.parametrize("kind", ["normal", "uniform", "long tails"])
def test_q8_is_within_half_a_step(kind: str, scale: float) -> None:
    """And near float16's smallest numbers, where a scale is a whole number of them, within that."""
    weight = random(kind) * scale
    highest = weight.view(-1, BLOCK).abs().amax(1, keepdim=True)
    bound = highest / 127 * 0.5 * 1.001 + highest * 2**-11 + 127 * 2**-25
    assert ((rounded(weight, "Q8_0") - weight).view(-1, BLOCK).abs() <= bound).all()


@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.0, 1000.0])
@pytest.mark.parametrize(("kind", "gain"), [("normal", 0.93), ("uniform", 1.0), ("long tails", 0.95)])
def test_q4_has_less_error_than_between_minimum_and_maximum(kind: str, gain: float, scale: float) -> None:
    weight = random(kind) * scale
    ours = (rounded(weight, "Q4_1") - weight).view(-1, BLOCK).square().sum(1)
    plain = (from_minimum_to_maximum(weight) - weight).view(-1, BLOCK).square().sum(1)
    assert (ours.sum() / plain.sum()).sqrt() < gain
    # rounding scale and minimum to float16 can cost a little in a block that the plain rule happens to suit
    assert (ours <= plain * 1.1).float().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_what_blocks_can_hold_is_held_exactly(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    levels = 15 if kind == "Q4_1" else 254
    q = torch.randint(0, levels + 1, (500, BLOCK), generator=generator).float()
    q[:, 3], q[:, 17] = 0, levels
    d = torch.rand(500, 1, generator=generator).add(0.5).half().float()
    m = torch.randn(500, 1, generator=generator).half().float() if kind == "Q4_1" else -127 * d
    found = rounded(d * q + m, kind)
    assert torch.allclose(found, d * q + m, rtol=0, atol=1e-5)
    again = rounded(found, kind)
    assert torch.allclose(again, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 0.1, 1e-7, 6e-8, 1e-10, 1e-38, 1e-45, 60000.0])
def test_blocks_of_one_value(kind: str, value: float) -> None:
    found = rounded(torch.full((2, 64), value), kind)
    assert (found - value).abs().max() <= abs(value) * 2**-8 + 127 * 2**-25
    assert value != 0 or not found.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("small", [1e-8, 1e-10, 1e-39, 1e-44])
def test_scales_that_float16_cannot_hold_become_zero(kind: str, small: float) -> None:
    found = rounded(random("normal") * small, kind)
    assert found.isfinite().all()
    assert found.abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38, -3e38])
def test_what_does_not_fit_is_seen(kind: str, bad: float) -> None:
    weight = random("normal")
    weight[7, 40] = bad
    assert bad_row(weight, kind) == 7
    assert bad_row(weight[8:], kind) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_does_not_depend_on_its_neighbours(kind: str) -> None:
    """Whatever pieces the work is done in."""
    weight = random("normal", 9000, 64)
    assert weight.numel() > 2 * (1 << 18)
    whole = KINDS[kind](weight)
    assert np.array_equal(KINDS[kind](weight[4097:4130]), whole[4097:4130])
    assert whole.shape == (9000, 2 * {"Q4_1": 20, "Q8_0": 34}[kind])
