"""Machine code as one block of bytes that runs wherever it is put: how `compiler` keeps kernels on disk and loads them.

`link` turns the object file that LLVM makes (x86-64, position-independent, small code model) into such an image once;
`Loaded` needs no LLVM: loading that took 0.1 s and 50 MB of every process. Layout of an object file: System V ABI,
chapter 4, and its AMD64 supplement, section 4.4 (relocations).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

_PROGBITS, _SYMTAB, _RELA, _NOBITS = 1, 2, 4, 8  # kinds of sections
_ALLOC = 2
"""Flag of a section that is there when the program runs."""
_PC32, _PLT32, _GOTPCREL, _GOTPCRELX, _REX_GOTPCRELX = 2, 4, 9, 41, 42
_JUMP, _STUB = b"\xff\x25", 16
"""`jmp *(rip + 10)`: a stub of 16 bytes jumps to the address in its second half."""


@dataclass(frozen=True, slots=True)
class Image:
    code: bytes
    symbols: dict[str, int]
    """Function -> where it begins."""
    imports: dict[str, int]
    """Function of the C library -> where its address is to be written, 8 bytes."""

    def to_bytes(self) -> bytes:
        head = asdict(self)
        del head["code"]
        return json.dumps(head).encode() + b"\n" + self.code

    @classmethod
    def from_bytes(cls, content: bytes) -> Image:
        head, _, code = content.partition(b"\n")
        return cls(code, **json.loads(head))


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class _Symbol(NamedTuple):
    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


def link(elf: bytes) -> Image:
    """Raises ValueError for an object that is not position-independent."""
    (headers,), (count,) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<H", elf, 0x3C)
    sections = [_Section(*struct.unpack_from("<IIQQQQIIQQ", elf, headers + 64 * at)) for at in range(count)]
    code, places = bytearray(), dict[int, int]()
    for index, section in enumerate(sections):
        # what is left out is of other kinds: tables for unwinding, which no kernel does
        if section.flags & _ALLOC and section.kind in (_PROGBITS, _NOBITS):
            code += bytes(-len(code) % max(section.align, 1))
            places[index] = len(code)
            code += _bytes(elf, section) if section.kind == _PROGBITS else bytes(section.size)
    (table,) = (section for section in sections if section.kind == _SYMTAB)
    names = _bytes(elf, sections[table.link])
    symbols = [_Symbol(*found) for found in struct.iter_unpack("<IBBHQQ", _bytes(elf, table))]
    stubs = dict[str, int]()
    for place, kind, symbol, addend in _relocations(elf, sections, places):
        if symbol.section in places:
            target = places[symbol.section] + symbol.value
        elif symbol.section == 0:  # of another library
            name = _name(names, symbol)
            if name not in stubs:
                code += bytes(-len(code) % _STUB)
                stubs[name] = len(code)
                code += _JUMP + struct.pack("<iH", 2, 0) + bytes(8)
            target = stubs[name]
        else:
            raise ValueError(f"a reference to section {symbol.section}, which is not in the image")
        if kind in (_GOTPCREL, _GOTPCRELX, _REX_GOTPCRELX) and symbol.section == 0:
            target += _STUB // 2
        elif kind not in (_PC32, _PLT32):
            raise ValueError(f"relocation {kind} depends on where the code lies")
        struct.pack_into("<i", code, place, target + addend - place)
    public = [symbol for symbol in symbols if symbol.info >> 4 and symbol.section in places]
    found = {_name(names, symbol): places[symbol.section] + symbol.value for symbol in public}
    return Image(bytes(code), found, {name: at + _STUB // 2 for name, at in stubs.items()})


def _relocations(
    elf: bytes, sections: list[_Section], places: dict[int, int]
) -> Iterator[tuple[int, int, _Symbol, int]]:
    """Place in the image, kind, symbol, addend."""
    for section in sections:
        if section.kind != _RELA or section.info not in places:
            continue
        table = sections[section.link]
        for offset, info, addend in struct.iter_unpack("<QQq", _bytes(elf, section)):
            symbol = _Symbol(*struct.unpack_from("<IBBHQQ", elf, table.offset + 24 * (info >> 32)))
            yield places[section.info] + offset, info & 0xFFFFFFFF, symbol, addend


def _bytes(elf: bytes, section: _Section) -> bytes:
    return elf[section.offset : section.offset + section.size]


def _name(names: bytes, symbol: _Symbol) -> str:
    return names[symbol.name : names.index(b"\0", symbol.name)].decode()


class Loaded:
    """An image in memory, ready to be called. It is gone when this object is."""

    def __init__(self, image: Image) -> None:
        self._symbols = image.symbols
        self._memory = mmap.mmap(-1, len(image.code), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.write(image.code)
        libc = ctypes.CDLL(None, use_errno=True)
        for name, at in image.imports.items():
            address = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value
            self._memory[at : at + 8] = struct.pack("<Q", address)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        executable = mmap.PROT_READ | mmap.PROT_EXEC
        if libc.mprotect(ctypes.c_void_p(self._base), ctypes.c_size_t(len(image.code)), executable):
            raise OSError(ctypes.get_errno(), "this system does not let a process run code that it loads itself")

    def address(self, name: str) -> int:
        """Raises KeyError."""
        return self._base + self._symbols[name]
