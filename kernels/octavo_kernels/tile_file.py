"""Reads `tiles.toml`, the tuned tile sizes, and checks every number in it. Called once, by `tiles`.

A mistake in the file is a `TilesError` that names the entry. Without the check it would be a kernel that does not
compile on somebody's card, or one that leaves the rest of a tile out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

FILE = Path(__file__).with_name("tiles.toml")
HEAD_SIZES = (64, 128, 256)
ATTENTION_KINDS = ("short", "whole", "long", "few", "bytes")
LIKE_SHORT = ATTENTION_KINDS[3:]  # where a group does not name them
EVERYWHERE = (
    "silu", "step", "rope", "sample", "filter", "filter_warps", "filter_keep", "join", "join_warps", "shared_rows",
    "programs_per_multiprocessor",
)  # fmt: skip
# the least and the most of each size; the matrix units multiply by 16
RANGES = {"block_m": (16, 256), "block_n": (1, 256), "block_k": (16, 16384), "num_warps": (1, 32), "num_stages": (1, 8)}


class TilesError(ValueError):
    """An entry of `tiles.toml` is missing, unknown or not a size that a kernel can have."""


@dataclass(frozen=True)
class AttentionTiles:
    """Rows of packed queries, keys a step of the loop, warps a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowTiles:
    """Outputs a program, inputs at a time, warps a program."""

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True)
class ProductTiles:
    """Rows and outputs a program, inputs at a time, warps a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


Tiles = TypeVar("Tiles", AttentionTiles, RowTiles, ProductTiles)


@dataclass(frozen=True)
class Group:
    """What holds for some architectures. Attention by kind and padded head size, for elements of two bytes."""

    attention: dict[str, dict[int, AttentionTiles]]
    row_plain: RowTiles
    row_gated: RowTiles
    products: tuple[ProductTiles, ...]


@dataclass(frozen=True)
class Tables:
    """All of the file."""

    everywhere: dict[str, int]
    groups: dict[str, Group]
    names: dict[int, str]
    """Architecture -> its group; the others have the group `default`."""

    def of(self, arch: int) -> Group:
        """The group of an architecture, 90 being compute capability 9.0."""
        return self.groups[self.names.get(arch, "default")]


def load_tiles(file: Path = FILE) -> Tables:
    """The checked tables. Raises `TilesError`."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise TilesError(f"{file} cannot be read: {error}") from error
    everywhere = _table(values.pop("everywhere", None), "everywhere", EVERYWHERE, whole=True)
    sizes = {name: _size(value, f"everywhere.{name}", 1, 65536) for name, value in everywhere.items()}
    if "default" not in values:
        raise TilesError("default is missing: every card needs sizes")
    default = _group(values.pop("default"), "default", None)
    groups, names = {"default": default}, dict[int, str]()
    for name, raw in values.items():
        table = dict(_table(raw, name, ("architectures", "attention", "row", "products")))
        for arch in _architectures(table.pop("architectures", None), name):
            if names.setdefault(arch, name) != name:
                raise TilesError(f"{name}.architectures: {arch} stands in {names[arch]} too")
        groups[name] = _group(table, name, default)
    return Tables(sizes, groups, names)


def _group(raw: object, name: str, default: Group | None) -> Group:
    """A kernel that the group does not name is that of `default`, which must name all. Attention is named whole."""
    whole = default is None
    table = _table(raw, name, ("attention", "row", "products"), whole=whole)
    row = _table(table.get("row", {}), f"{name}.row", ("plain", "gated"), whole=whole)
    found: dict[str, Any] = {} if default is None else dict(vars(default))
    if "attention" in table:
        place = f"{name}.attention"
        raw_kinds = table["attention"]
        if isinstance(raw_kinds, dict) and "short" in raw_kinds:
            raw_kinds = dict.fromkeys(LIKE_SHORT, raw_kinds["short"]) | raw_kinds
        kinds = _table(raw_kinds, place, ATTENTION_KINDS, whole=True)
        found["attention"] = {kind: _by_head_size(kinds[kind], f"{place}.{kind}") for kind in ATTENTION_KINDS}
    for kind, tiles in row.items():
        found[f"row_{kind}"] = _tiles(RowTiles, tiles, f"{name}.row.{kind}")
    if "products" in table:
        found["products"] = _products(table["products"], f"{name}.products")
    return Group(**found)


def _by_head_size(raw: object, place: str) -> dict[int, AttentionTiles]:
    heads = _table(raw, place, tuple(map(str, HEAD_SIZES)), whole=True)
    return {int(head): _tiles(AttentionTiles, tiles, f"{place}.{head}") for head, tiles in heads.items()}


def _products(raw: object, place: str) -> tuple[ProductTiles, ...]:
    if not isinstance(raw, list) or not raw:
        raise TilesError(f"{place} must be a list of tables")
    found = tuple(_tiles(ProductTiles, tiles, f"{place}[{at}]") for at, tiles in enumerate(raw))
    if any(tiles.block_m < 64 for tiles in found):
        raise TilesError(f"{place}: block_m must be at least 64, or the chip adds in another order where rows are few")
    return found


def _tiles(kind: type[Tiles], raw: object, place: str) -> Tiles:
    names = tuple(part.name for part in fields(kind))
    table = _table(raw, place, names, whole=True)
    sizes = {name: _size(table[name], f"{place}.{name}", *RANGES[name]) for name in names}
    if kind is not RowTiles and sizes["block_n"] < 16:
        raise TilesError(f"{place}.block_n must be at least 16, which the matrix units multiply by")
    return kind(**sizes)


def _table(raw: object, place: str, known: tuple[str, ...], *, whole: bool = False) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        problem = "is missing" if raw is None else f"must be a table with {', '.join(known)}"
        raise TilesError(f"{place} {problem}")
    for name in raw:
        if name not in known:
            raise TilesError(f"{place}.{name} is unknown; known here: {', '.join(known)}")
    for name in known if whole else ():
        if name not in raw:
            raise TilesError(f"{place}.{name} is missing")
    return raw


def _size(value: object, place: str, least: int, most: int) -> int:
    stages = place.endswith("num_stages")  # the one count that need not be a power of two
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise TilesError(f"{place} must be an integer from {least} to {most}, not {value!r}")
    if value & (value - 1) and not stages:
        raise TilesError(f"{place} must be a power of two, not {value}")
    return value


def _architectures(value: object, name: str) -> list[int]:
    numbers = isinstance(value, list) and all(type(arch) is int and 80 <= arch < 1000 for arch in value)
    if not numbers or not value:
        raise TilesError(f"{name}.architectures must list compute capabilities such as 90, not {value!r}")
    assert isinstance(value, list)
    return value
