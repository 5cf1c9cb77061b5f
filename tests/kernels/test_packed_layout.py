"""Weights in the layout of the CPU kernels: every value is kept, in whatever pieces it came."""

from __future__ import annotations

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from octavo_kernels.cpu.packed import Packer, empty_packed, pack, packed_bytes, unpack
from octavo_kernels.cpu.quantise import BYTES

KINDS = ("Q4_0", "Q4_1", "Q8_0")


def blocks_of(kind: str, outputs: int, inputs: int) -> torch.Tensor:
    blocks = torch.randint(0, 256, (outputs, inputs // 32, BYTES[kind]), dtype=torch.uint8)
    head = 4 if kind == "Q4_1" else 2
    blocks[..., :head] = (torch.randn(outputs, inputs // 32, head // 2) * 0.02).half().view(torch.uint8)
    return blocks.view(outputs, -1)


@pytest.mark.parametrize("outputs", [96, 70, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_pack_keeps_every_weight(kind: str, outputs: int) -> None:
    blocks = blocks_of(kind, outputs, 64)
    expected = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind]))
    found = unpack(pack(blocks, kind, 64))
    torch.testing.assert_close(found[:outputs], expected, atol=1e-6, rtol=1e-6)
    assert found.shape == (-(-outputs // 32) * 32, 64)
    assert not found[outputs:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_same_as_the_whole(kind: str) -> None:
    outputs, inputs = 5000, 96
    blocks = blocks_of(kind, outputs, inputs)
    whole = pack(blocks, kind, inputs)
    memory = torch.full((packed_bytes(kind, outputs, inputs) + 64,), 7, dtype=torch.uint8)
    packed = empty_packed(kind, outputs, inputs, memory[:-64])
    packer = Packer(packed, kind)
    for piece in torch.split(blocks, [1, 31, 0, 40, 4000, 900, 28]):
        packer.add(piece)
    packer.finish()
    assert torch.equal(packed.quants, whole.quants)
    assert torch.equal(packed.scales, whole.scales)
    assert kind != "Q4_1" or torch.equal(packed.minima, whole.minima)
    assert (memory[-64:] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_are_found(kind: str) -> None:
    blocks = blocks_of(kind, 100, 64)
    assert pack(blocks, kind, 64).first_bad_row() is None
    halves = blocks.view(100, 2, -1)[:, 1, : 4 if kind == "Q4_1" else 2].view(torch.float16)
    for row, bad in ((97, float("nan")), (41, float("inf"))):
        halves[row, -1] = bad
        assert pack(blocks, kind, 64).first_bad_row() == row
