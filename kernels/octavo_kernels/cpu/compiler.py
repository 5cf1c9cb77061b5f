"""Turns a module of kernels into machine code for this processor, once: the object is kept on disk by its content.

No compiler needs to be installed: LLVM comes with llvmlite, and what it makes is loaded into the process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo_kernels.cpu.processor import cpu_flags

NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")
"""What the kernels of this folder are written for (AMD since Zen 4, Intel since Cooper Lake and Sapphire Rapids)."""

_DIGEST = 16
"""Bytes of the hashes that name a file of the cache and begin it."""


_kept: Path | None = None


def keep_objects_in(folder: Path) -> None:
    """Where kernels without a model (sampling) look for their objects, and leave them. Until then they are compiled by
    every process that needs them."""
    global _kept
    _kept = folder


def kept_objects() -> Path | None:
    return _kept


@functools.cache
def available() -> bool:
    """These kernels run here: llvmlite is installed and the processor has what they need."""
    if sys.platform != "linux":
        return False
    try:
        import llvmlite.binding  # noqa: F401
    except (ImportError, OSError):
        return False
    return cpu_flags().issuperset(NEEDED)


class Library:
    """The compiled kernels of one module. They live as long as this object does.

    `key`: with the sources of this folder, decides what `make_module` makes; it is then only called when the object is
    not in the cache (writing the text of the default model's kernels takes 0.14 s). Without it the text decides."""

    def __init__(self, make_module: Callable[[], Any], *, cache: Path | None, key: str | None = None) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        text = None if key else str(make_module())
        made_for = f"{llvm.llvm_version_info} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
        name = _digest(f"{made_for}\n{text or _sources() + str(key)}".encode()).hex()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        code = _read(cache / name) if cache else None
        if code is None:
            code = _compile(llvm, machine, text or str(make_module()))
            if cache:
                _write(cache / name, code)
        self._engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        found: int = self._engine.get_function_address(name)
        if not found:
            raise KeyError(name)
        return found


@functools.cache
def library_of(name: str, write: Callable[[Any], None]) -> Library:
    """Of one kernel that any caller may run alone. Loaded or compiled when first needed, then kept."""

    def make() -> Any:
        from llvmlite import ir

        module = ir.Module(name)
        write(module)
        return module

    return Library(make, cache=_kept, key=name)


def _compile(llvm: Any, machine: Any, text: str) -> bytes:
    module = llvm.parse_assembly(text)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    return code


def _read(path: Path) -> bytes | None:
    """None for a file that is not what was written: LLVM ends the process when it is given half an object."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[_DIGEST:] if content[:_DIGEST] == _digest(content[_DIGEST:]) else None


@functools.cache
def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _digest(b"\n".join(file.read_bytes() for file in files)).hex()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _write(path: Path, code: bytes) -> None:
    """In one rename, so that nobody reads half an object. A cache that cannot be written costs a second a start."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.write_bytes(_digest(code) + code)
            os.replace(part, path)
