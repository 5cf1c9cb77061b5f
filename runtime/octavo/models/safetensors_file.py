"""One safetensors file: its header read with every check, its tensors as views of a memory map. Called by `weights`.

Our own parser of https://huggingface.co/docs/safetensors: each length is held against the size of the file before it is
used, so a file that lies is a `ModelFileError` that names the tensor, not a crash, a hang or wrong numbers.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.mapped import drop_pages

_MAX_HEADER = 100 << 20  # the bound of the reference implementation
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` and `end` count bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """An open file. `entries` maps names to places; `tensor` gives a read-only view without a copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as stream:
                self._map: mmap.mmap | None = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelFileError("is missing", file=str(path)) from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelFileError(f"cannot be read: {error}", file=str(path)) from error
        try:
            self.entries = _parse(self._map, str(path))
        except BaseException:
            self.close()
            raise

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` as a view of the file. Do not write to it: the map is read-only."""
        entry = self.entries[name]
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        with warnings.catch_warnings():  # torch warns that the buffer is not writable; nothing here writes
            warnings.simplefilter("ignore", UserWarning)
            raw = torch.frombuffer(memoryview(self._map)[entry.start : entry.end], dtype=torch.uint8)
        if entry.start % entry.dtype.itemsize:  # the format allows any offset, torch does not
            raw = raw.clone()
        return raw.view(entry.dtype).view(entry.shape)

    def forget(self, name: str) -> None:
        """The pages of this tensor need not stay in memory."""
        if self._map is not None:
            drop_pages(self._map, self.entries[name].start, self.entries[name].end)

    def close(self) -> None:
        """Unmap the file; if a tensor still views it, the map goes with the last such view."""
        mapped, self._map = self._map, None
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:
                return


def _parse(data: mmap.mmap, file: str) -> dict[str, Entry]:
    size = len(data)
    if size < 8:
        raise ModelFileError(f"is {size} bytes long: too short for a safetensors file", file=file)
    (length,) = struct.unpack_from("<Q", data, 0)
    if length > min(size - 8, _MAX_HEADER):
        raise ModelFileError(f"the header claims {length} bytes; the file has {size}", file=file, field="header")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ModelFileError("is nested too deeply", file=file, field="header") from None
    except ValueError as error:
        raise ModelFileError(f"is not sound JSON: {error}", file=file, field="header") from error
    if not isinstance(header, dict):
        raise ModelFileError("is not a JSON object", file=file, field="header")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, 8 + length, size, file) for name, value in header.items()}
    end, last = 8 + length, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < end:
            raise ModelFileError(f"overlaps {last}", file=file, field=name)
        end, last = entry.end, name
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(name: str, value: Any, base: int, size: int, file: str) -> Entry:
    def bad(message: str) -> ModelFileError:
        return ModelFileError(message, file=file, field=name[:120])

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise bad("needs dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str):
        raise bad("dtype must be a string")
    if kind not in _DTYPES:
        raise UnsupportedModelError(f"has the unknown dtype {kind[:20]!r}", file=file, field=name[:120])
    if not _whole(shape) or len(shape) > 16 or max(shape, default=0) >= 1 << 63:
        raise bad("shape must be a list of whole numbers")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1] or offsets[1] > size - base:
        raise bad(f"data_offsets {str(offsets)[:60]} do not lie within the {size - base} bytes of data")
    dtype = _DTYPES[kind]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise bad(f"has {offsets[1] - offsets[0]} bytes, which is not {kind} of shape {shape}")
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
