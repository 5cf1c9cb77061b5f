"""Tile sizes of the kernels, per GPU architecture. Read by the `*_triton` modules; `tiles.toml` is the place to tune.

The numbers that stand here, in contrast to those in the file, decide about the order of sums, for all chips alike. The
limits are shared memory a block (163 KB on sm_80, 227 KB on sm_90 and sm_100, 99 KB on the consumer chips) and, for
attention, registers for a `[block_m, head size]` accumulator. `tests/kernels/test_ahead_of_time.py` compiles every
entry.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from octavo_kernels.tile_file import AttentionTiles, ProductTiles, RowTiles, load_tiles

TABLES = load_tiles()

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
JOINED, JOIN_WARPS = TABLES.everywhere["join"], TABLES.everywhere["join_warps"]
# Rows (sequences times query heads of a KV head) in a tile over keys that all sequences share.
SHARED_ROWS = TABLES.everywhere["shared_rows"]
# Programs wanted on each multiprocessor before splits of one sequence are given to one program in turn.
PROGRAMS_PER_SM = TABLES.everywhere["programs_per_multiprocessor"]

SAMPLE_TILE = TABLES.everywhere["sample"]
FILTER_TILE, FILTER_WARPS = TABLES.everywhere["filter"], TABLES.everywhere["filter_warps"]
# Tokens gathered once a filter's search has come down to so few.
FILTER_KEEP = TABLES.everywhere["filter_keep"]
SILU_TILE = TABLES.everywhere["silu"]
STEP_TILE = TABLES.everywhere["step"]
# Elements of a `[heads, half head]` tile in the rotary kernel.
ROPE_TILE = TABLES.everywhere["rope"]


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
def attention_tiles(arch: int, padded_head_size: int, itemsize: int, group: int, kind: str) -> AttentionTiles:
    """Tiles for a chip, a head size (padded to a power of two), an element size in bytes and query heads a KV head.
    `kind`: one of `ATTENTION_KINDS` (see `tiles.toml`)."""
    tiles = TABLES.of(arch).attention[kind][max(64, padded_head_size)]
    block_m, block_n, num_warps = tiles.block_m, tiles.block_n, tiles.num_warps
    if itemsize > 2:  # fp32 runs on the ordinary cores: twice the bytes, and no matrix unit to hold the accumulator
        block_m, block_n = min(block_m, 32), max(16, block_n // 2)
        num_warps = 4
    while block_m < group:  # all heads of a group stand in one tile, or keys would be read twice
        block_m *= 2
    return AttentionTiles(block_m, block_n, num_warps, tiles.num_stages)


def decoding_kind(programs: int, whole: bool, cache_itemsize: int) -> str:
    """Of tiles for sequences with one new token each: so many, times KV heads. `whole`: none of them is split."""
    if whole:
        return "whole"
    if programs < MANY_PROGRAMS:
        return "few"
    return "bytes" if cache_itemsize == 1 else "short"


@lru_cache(maxsize=128)
def row_tiles(arch: int, inputs: int, gated: bool) -> RowTiles:
    """Tiles for one row times a matrix: enough programs for every multiprocessor, each with many loads under way."""
    tuned = TABLES.of(arch)
    tiles = tuned.row_gated if gated else tuned.row_plain
    return RowTiles(tiles.block_n, min(tiles.block_k, 1 << (inputs - 1).bit_length()), tiles.num_warps)


@lru_cache(maxsize=1024)
def invariant_tiles(arch: int, rows: int, outputs: int, itemsize: int, processors: int) -> ProductTiles:
    """Tiles for a product of so many rows and outputs: the first of the chip's, from large to small, that gives every
    multiprocessor a program. None of them changes a bit of the result."""
    if itemsize > 2:  # on the ordinary cores
        return ProductTiles(64, 32, 32, 4, 2)
    choices = TABLES.of(arch).products
    for tile in choices:
        fills = tile.block_m == 64 or rows > 64
        if fills and -(-rows // tile.block_m) * -(-outputs // tile.block_n) >= processors:
            return tile
    return choices[-1]
