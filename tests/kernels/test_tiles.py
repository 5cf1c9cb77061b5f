"""`tiles.toml`: every card finds its sizes, and a mistake in the file names its entry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from octavo_kernels import tiles
from octavo_kernels.tile_file import FILE, HEAD_SIZES, AttentionTiles, RowTiles, TilesError, load_tiles
from test_ahead_of_time import CONSUMER, SHARED_LIMIT

TEXT = FILE.read_text()


def test_every_group_is_compiled_ahead_of_time() -> None:
    assert {tiles.TABLES.names.get(arch, "default") for arch in SHARED_LIMIT | CONSUMER} == set(tiles.TABLES.groups)


def test_a_card_gets_its_group_and_an_unknown_one_the_default() -> None:
    groups = tiles.TABLES.groups
    assert tiles.TABLES.of(90) is tiles.TABLES.of(100) is groups["sm_90"]
    assert tiles.TABLES.of(80) is groups["sm_80"]
    for arch in (86, 89, 120):
        assert tiles.TABLES.of(arch) is groups["default"]
        for short in (True, False):
            for head in HEAD_SIZES:
                assert isinstance(tiles.attention_tiles(arch, head, 2, 1, short), AttentionTiles)


def test_a_kernel_that_a_group_does_not_name_is_that_of_the_default() -> None:
    groups = tiles.TABLES.groups
    assert groups["sm_90"].row_plain is groups["default"].row_plain
    assert groups["sm_90"].attention_short != groups["default"].attention_short


def test_a_row_no_longer_than_its_inputs() -> None:
    assert tiles.row_tiles(90, 14336, False) == RowTiles(2, 2048, 4)
    assert tiles.row_tiles(90, 576, False) == RowTiles(2, 1024, 4)
    assert tiles.row_tiles(90, 576, True) == RowTiles(2, 1024, 2)
    assert tiles.row_tiles(90, 64, True) == RowTiles(2, 64, 2)


MISTAKES = [
    ("[default.row]", "[default.rows]", "default.rows is unknown; known here: attention, row"),
    ("[sm_90]\narchitectures = [90, 100, 103]", "", "sm_90.architectures must list compute capabilities"),
    ("[90, 100, 103]", "[90, 80]", "sm_90.architectures: 80 stands in sm_80 too"),
    ("[90, 100, 103]", '["90"]', "sm_90.architectures must list compute capabilities such as 90, not ['90']"),
    ("silu = 1024", "", "everywhere.silu is missing"),
    ("silu = 1024", "silu = 1000", "everywhere.silu must be a power of two, not 1000"),
    ("silu = 1024", "silu = true", "everywhere.silu must be an integer from 1 to 65536, not True"),
    ("silu = 1024", "silu = [", "tiles.toml cannot be read"),
    ("64 = { block_m = 16, block_n = 128", "64 = { block_m = 8, block_n = 128",
     "sm_90.attention.short.64.block_m must be an integer from 16 to 256, not 8"),
    ("64 = { block_m = 16, block_n = 128", "64 = { block_m = 16, block_n = 8",
     "sm_90.attention.short.64.block_n must be at least 16"),
    ("64 = { block_m = 16, block_n = 128", "32 = { block_m = 16, block_n = 128",
     "sm_90.attention.short.32 is unknown; known here: 64, 128, 256"),
    ("plain = { block_n = 2, block_k = 2048, num_warps = 4 }", "plain = { block_n = 2, block_k = 2048 }",
     "default.row.plain.num_warps is missing"),
    ("plain = { block_n = 2, block_k = 2048, num_warps = 4 }", "plain = 2",
     "default.row.plain must be a table with block_n, block_k, num_warps"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[message[:40] for _, _, message in MISTAKES])
def test_a_mistake_names_its_entry(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert TEXT.count(old) == 1
    file = tmp_path / "tiles.toml"
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(TilesError, match=re.escape(message)):
        load_tiles(file)


def test_every_card_needs_sizes(tmp_path: Path) -> None:
    file = tmp_path / "tiles.toml"
    file.write_text(TEXT.replace("[default.", "[other."))
    with pytest.raises(TilesError, match="default is missing"):
        load_tiles(file)
    with pytest.raises(TilesError, match=r"absent\.toml cannot be read"):
        load_tiles(tmp_path / "absent.toml")
