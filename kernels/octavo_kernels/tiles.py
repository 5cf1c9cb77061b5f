"""Tile sizes of the kernels, per GPU architecture: the one place to tune. Read by the `*_triton` modules.

The limits are shared memory a block (163 KB on sm_80, 227 KB on sm_90 and sm_100, 99 KB on the consumer chips) and, for
attention, registers for a `[block_m, head size]` accumulator. `tests/kernels/test_ahead_of_time.py` compiles every
entry. Tiles may depend on shapes of the model and on the chip, never on the batch: a sequence's result must not change
with its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

# A sequence with at most this many new tokens is split over its keys. Partial sums take room for so many tokens of
# every sequence, 67 MB for 256 sequences of 16 heads of 128.
SHORT_QUERY = 1
# Keys in a split, doubled until a sequence has at most MAX_SPLITS of them. Fixed, so that a result has one value.
MIN_SPLIT = 256
MAX_SPLITS = 32
# The same where there are at most so many sequences: 6.6 us instead of 9.5 for one of 200 tokens, but 29 instead of 27
# for 64 of them.
FEW_SEQUENCES, FEW_SPLIT = 4, 64
# And where sequences times KV heads are so many: 256 sequences of 150 to 1100 tokens in 241 us instead of 247 (16 heads
# over 8 KV heads; with 32 heads 242 and 256), for 217 us worth of reading. Fewer partial sums, or none.
MANY_PROGRAMS, MANY_SPLIT = 512, 1024
# Where bits must not depend on how a sequence is cut into steps, splits are never doubled, so there are more.
MAX_INVARIANT_SPLITS = 128
# Splits that are loaded at once where they are joined.
JOINED, JOIN_WARPS = 8, 1
# Rows (sequences times query heads of a KV head) in a tile over keys that all sequences share.
SHARED_ROWS = 64
# Programs wanted on each multiprocessor before splits of one sequence are given to one program in turn.
PROGRAMS_PER_SM = 16

SAMPLE_TILE = 2048
FILTER_TILE, FILTER_WARPS = 4096, 16
# Tokens gathered once a filter's search has come down to so few.
FILTER_KEEP = 2048
SILU_TILE = 1024
STEP_TILE = 256
# Elements of a `[heads, half head]` tile in the rotary kernel.
ROPE_TILE = 512


@dataclass(frozen=True)
class AttentionTiles:
    """Rows of packed queries, keys a step of the loop, warps a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (family, short?) -> padded head size -> tiles, for elements of two bytes.
_ATTENTION: dict[tuple[int, bool], dict[int, AttentionTiles]] = {
    (80, True): {
        64: AttentionTiles(16, 64, 4, 3),
        128: AttentionTiles(16, 64, 4, 2),
        256: AttentionTiles(16, 32, 4, 2),
    },
    (80, False): {
        64: AttentionTiles(128, 64, 4, 3),
        128: AttentionTiles(128, 64, 8, 2),
        256: AttentionTiles(64, 32, 4, 2),
    },
    (90, True): {
        64: AttentionTiles(16, 128, 4, 3),
        128: AttentionTiles(16, 64, 4, 1),
        256: AttentionTiles(16, 64, 4, 2),
    },
    (90, False): {
        64: AttentionTiles(128, 64, 4, 3),
        128: AttentionTiles(64, 64, 4, 2),
        256: AttentionTiles(64, 64, 4, 2),
    },
    (0, True): {
        64: AttentionTiles(16, 64, 4, 2),
        128: AttentionTiles(16, 32, 4, 2),
        256: AttentionTiles(16, 16, 4, 2),
    },
    (0, False): {
        64: AttentionTiles(64, 64, 4, 2),
        128: AttentionTiles(64, 32, 4, 2),
        256: AttentionTiles(32, 16, 4, 2),
    },
}


@lru_cache(maxsize=32)
def architecture(device: torch.device) -> int:
    """Compute capability as one number, 90 for an H100. The interpreter on a CPU stands for an A100."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small number for the interpreter, which runs programs in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@lru_cache(maxsize=128)
def attention_tiles(arch: int, padded_head_size: int, itemsize: int, group: int, short: bool) -> AttentionTiles:
    """Tiles for a chip, a head size (padded to a power of two), an element size in bytes and query heads a KV head."""
    family = {80: 80, 90: 90, 100: 90, 103: 90}.get(arch, 0)
    tiles = _ATTENTION[family, short][max(64, padded_head_size)]
    block_m, block_n, num_warps = tiles.block_m, tiles.block_n, tiles.num_warps
    if itemsize > 2:  # fp32 runs on the ordinary cores: twice the bytes, and no matrix unit to hold the accumulator
        block_m, block_n = min(block_m, 32), max(16, block_n // 2)
        num_warps = 4
    while block_m < group:  # all heads of a group stand in one tile, or keys would be read twice
        block_m *= 2
    return AttentionTiles(block_m, block_n, num_warps, tiles.num_stages)


@dataclass(frozen=True)
class RowTiles:
    """Outputs a program, inputs at a time, warps a program."""

    block_n: int
    block_k: int
    num_warps: int


@lru_cache(maxsize=128)
def row_tiles(outputs: int, inputs: int, gated: bool) -> RowTiles:
    """Tiles for one row times a matrix: enough programs for every multiprocessor, each with many loads under way. On an
    H100, 2 outputs and whole rows were within 0.2 us of the best of 60 choices, for 1024 to 3072 inputs."""
    block_k = 1 << (inputs - 1).bit_length()
    return RowTiles(2, min(1024, block_k), 2) if gated else RowTiles(2, min(2048, block_k), 4)


@dataclass(frozen=True)
class ProductTiles:
    """Rows and outputs a program, inputs at a time, warps a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# From the largest to the smallest: the first that gives every multiprocessor a program. All have 64 rows at least, so
# that Hopper's matrix unit takes all of them by the same instructions.
_PRODUCTS = {
    90: (
        ProductTiles(128, 256, 64, 8, 3), ProductTiles(128, 128, 64, 8, 4), ProductTiles(64, 64, 128, 4, 4),
        ProductTiles(64, 32, 128, 4, 5), ProductTiles(64, 16, 128, 4, 5),
    ),
    80: (ProductTiles(128, 128, 64, 8, 3), ProductTiles(64, 64, 64, 4, 4), ProductTiles(64, 16, 128, 4, 4)),
    0: (ProductTiles(128, 128, 32, 8, 3), ProductTiles(64, 64, 64, 4, 3), ProductTiles(64, 16, 64, 4, 4)),
}  # fmt: skip


@lru_cache(maxsize=1024)
def invariant_tiles(arch: int, rows: int, outputs: int, itemsize: int, processors: int) -> ProductTiles:
    """Tiles for a product of so many rows and outputs. None of them changes a bit of the result."""
    if itemsize > 2:  # on the ordinary cores
        return ProductTiles(64, 32, 32, 4, 2)
    family = {80: 80, 90: 90, 100: 90, 103: 90}.get(arch, 0)
    for tile in _PRODUCTS[family]:
        fills = tile.block_m == 64 or rows > 64
        if fills and -(-rows // tile.block_m) * -(-outputs // tile.block_n) >= processors:
            return tile
    return _PRODUCTS[family][-1]
