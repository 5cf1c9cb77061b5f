"""The header of a GGUF file: its metadata and where its tensors lie.

Called by `gguf_config`, `gguf_tokenizer` and `weights`.

Read with our own parser. `gguf.GGUFReader` makes an array object for each of a hundred thousand strings, which takes
seconds, and believes every length it reads. Here each count and length is held against the size of the file first, so a
file that lies is a `ModelFileError` at once; arrays of strings are stepped over and decoded only when asked for. The
`gguf` library still supplies the arithmetic of rare types, by `gguf_quants`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from octavo.errors import ModelFileError, UnsupportedModelError

# number of a type -> name, elements of a block, bytes of a block; a test holds it against gguf.constants. That module
# is not imported for it because it brings the whole package along, 0.1 s of a start.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# generous bounds: the largest real files have thousands of tensors and some 300 000 tokens
_MAX_KEYS, _MAX_TENSORS, _MAX_ITEMS, _MAX_NAME = 1 << 16, 1 << 18, 1 << 24, 1 << 16
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` is row-major as torch has it, `offset` counts bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _StringArray:
    offset: int
    count: int


class GGUFFile:
    """A parsed, memory-mapped GGUF file. `metadata` holds scalars, strings and arrays of numbers; see also `strings`.

    Raises `ModelFileError` for anything that is not a sound little-endian GGUF of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._arrays: dict[str, _StringArray] = {}
        try:
            with open(path, "rb") as stream:
                self.data: mmap.mmap = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelFileError("is missing", file=str(path)) from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelFileError(f"cannot be read: {error}", file=str(path)) from error
        self._size = len(self.data)
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap the file; if a tensor still views it, the map goes with the last such view."""
        try:
            self.data.close()
        except BufferError:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def strings(self, key: str) -> list[str]:
        """The array of strings under `key`; `ModelFileError` when absent. Bytes that are not UTF-8 become U+FFFD."""
        array = self._arrays.get(key)
        if array is None:
            raise self._bad(key, "is missing or is not an array of strings")
        data, at, unpack, out = self.data, array.offset, _U64.unpack_from, []
        for _ in range(array.count):  # the lengths were checked when the header was parsed
            (length,) = unpack(data, at)
            out.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        return out

    def has_strings(self, key: str) -> bool:
        return key in self._arrays

    def floats(self, name: str) -> list[float]:
        """The values of a small F32 tensor, flat."""
        info = self.tensors[name]
        if info.type_name != "F32":
            raise UnsupportedModelError(f"is {info.type_name}; F32 is expected", file=str(self.path), field=name)
        return list(struct.unpack_from(f"<{info.nbytes // 4}f", self.data, info.offset))

    # -- parsing -----------------------------------------------------------------------------------------------------

    def _bad(self, field: str | None, message: str) -> ModelFileError:
        return ModelFileError(message, file=str(self.path), field=field)

    def _need(self, at: int, count: int, field: str | None) -> None:
        if count > self._size - at:
            raise self._bad(field, f"claims {count} bytes at {at}, but the file ends at {self._size}")

    def _u32(self, at: int, field: str | None) -> int:
        self._need(at, 4, field)
        return int(_U32.unpack_from(self.data, at)[0])

    def _u64(self, at: int, field: str | None) -> int:
        self._need(at, 8, field)
        return int(_U64.unpack_from(self.data, at)[0])

    def _text(self, at: int, field: str | None, limit: int | None = None) -> tuple[str, int]:
        """The string at `at` and the offset after it."""
        length = self._u64(at, field)
        if limit is not None and length > limit:
            raise self._bad(field, f"claims a name of {length} bytes")
        self._need(at + 8, length, field)
        try:
            return self.data[at + 8 : at + 8 + length].decode("utf-8"), at + 8 + length
        except UnicodeDecodeError:
            raise self._bad(field, "is not UTF-8") from None

    def _parse(self) -> None:
        if self.data[:4] != b"GGUF":
            raise self._bad("magic", f"is {self.data[:4]!r}: this is not a GGUF file")
        version = self._u32(4, "version")
        if version not in (2, 3):
            hint = "; a big-endian file is not implemented" if version & 0xFFFF == 0 else ""
            raise UnsupportedModelError(f"is {version}; 2 and 3 are known{hint}", file=str(self.path), field="version")
        tensor_count, key_count = self._u64(8, "tensor_count"), self._u64(16, "kv_count")
        if key_count > _MAX_KEYS:
            raise self._bad("kv_count", f"claims {key_count} keys")
        if tensor_count > _MAX_TENSORS:
            raise self._bad("tensor_count", f"claims {tensor_count} tensors")
        at = 24
        for _ in range(key_count):
            key, at = self._text(at, "kv_count", _MAX_NAME)
            if key in self.metadata or key in self._arrays:
                raise self._bad(key[:60], "occurs twice")
            at = self._value(key, self._u32(at, key), at + 4)
        self._tensor_infos(tensor_count, at)

    def _value(self, key: str, kind: int, at: int) -> int:
        """Store the value at `at` under `key`; returns the offset after it."""
        if kind == _STRING:
            self.metadata[key], at = self._text(at, key)
            return at
        if kind != _ARRAY:
            code = self._code(key, kind)
            self._need(at, struct.calcsize("<" + code), key)
            self.metadata[key] = struct.unpack_from("<" + code, self.data, at)[0]
            return at + struct.calcsize("<" + code)
        item, count, at = self._u32(at, key), self._u64(at + 4, key), at + 12
        if count > _MAX_ITEMS:
            raise self._bad(key, f"claims an array of {count} items")
        if item == _STRING:
            return self._skip_strings(key, count, at)
        code = self._code(key, item)
        size = count * struct.calcsize("<" + code)
        self._need(at, size, key)
        self.metadata[key] = list(struct.unpack_from(f"<{count}{code}", self.data, at))
        return at + size

    def _code(self, key: str, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._bad(key, f"has the unknown type {kind}" if kind != _ARRAY else "holds an array of arrays")
        return _SCALARS[kind]

    def _skip_strings(self, key: str, count: int, at: int) -> int:
        self._need(at, 8 * count, key)
        start, size, data, unpack = at, self._size, self.data, _U64.unpack_from
        for _ in range(count):
            if at + 8 > size:
                raise self._bad(key, f"runs past the end of the file at {size}")
            at += 8 + unpack(data, at)[0]
        if at > size:
            raise self._bad(key, f"runs past the end of the file at {size}")
        self._arrays[key] = _StringArray(start, count)
        return at

    def _tensor_infos(self, count: int, at: int) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._bad("general.alignment", "must be a power of two")
        self._need(at, 24 * count, "tensor_count")
        found: list[tuple[str, tuple[int, ...], str, int, int]] = []
        for _ in range(count):
            name, at = self._text(at, "tensor_count", _MAX_NAME)
            rank = self._u32(at, name)
            if not 1 <= rank <= 4:
                raise self._bad(name, f"has {rank} dimensions")
            self._need(at + 4, 8 * rank + 12, name)
            dims = struct.unpack_from(f"<{rank}Q", self.data, at + 4)
            type_id, offset = struct.unpack_from("<IQ", self.data, at + 4 + 8 * rank)
            at += 16 + 8 * rank
            if type_id not in TYPES:
                raise UnsupportedModelError(f"has the unknown type {type_id}", file=str(self.path), field=name)
            kind, block, block_bytes = TYPES[type_id]
            elements = 1
            for dim in dims:
                elements *= dim
                if dim == 0 or elements > 1 << 48:
                    raise self._bad(name, f"has the impossible shape {dims}")
            if dims[0] % block:
                raise self._bad(name, f"has rows of {dims[0]}, not a multiple of {kind}'s block of {block}")
            found.append((name, tuple(reversed(dims)), kind, offset, elements // block * block_bytes))
        data_start = -(-at // alignment) * alignment
        for name, shape, kind, offset, nbytes in found:
            if offset % alignment:
                raise self._bad(name, f"starts at {offset}, not a multiple of the alignment {alignment}")
            self._need(data_start + offset, nbytes, name)
            if name in self.tensors:
                raise self._bad(name, "occurs twice")
            self.tensors[name] = TensorInfo(name, shape, kind, data_start + offset, nbytes)
        end, last = 0, ""
        for info in sorted(self.tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise self._bad(info.name, f"overlaps {last}")
            end, last = info.offset + info.nbytes, info.name
