"""Turns a module of kernels into machine code for this processor, once: it is kept on disk by its content.

No compiler needs to be installed: LLVM comes with llvmlite. It is loaded only by a process that has to compile.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octavo_kernels.cpu.image import Image, Loaded, link
from octavo_kernels.cpu.processor import cpu_flags, cpu_name

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
    if sys.platform != "linux" or find_spec("llvmlite") is None:
        return False
    return cpu_flags().issuperset(NEEDED)


class Library:
    """The compiled kernels of one module. They live as long as this object does.

    `key`: with the sources of this folder, decides what `make_module` makes; it is then only called when the object is
    not in the cache (writing the text of the default model's kernels takes 0.14 s). Without it the text decides."""

    def __init__(self, make_module: Callable[[], Any], *, cache: Path | None, key: str | None = None) -> None:
        import llvmlite  # only its version; `llvmlite.binding` is what loads LLVM

        text = None if key else str(make_module())
        made_by = f"llvmlite {llvmlite.__version__} for {cpu_name()} {sorted(cpu_flags())}"
        name = _digest(f"{made_by}\n{text or _sources() + str(key)}".encode()).hex()
        kept = _read(cache / name) if cache else None
        if kept is None:
            kept = link(_compile(text or str(make_module()))).to_bytes()
            if cache:
                _write(cache / name, kept)
        self._loaded = Loaded(Image.from_bytes(kept))

    def address(self, name: str) -> int:
        """Raises KeyError."""
        return self._loaded.address(name)


@functools.cache
def library_of(name: str, write: Callable[[Any], None]) -> Library:
    """Of one kernel that any caller may run alone. Loaded or compiled when first needed, then kept."""

    def make() -> Any:
        from llvmlite import ir

        module = ir.Module(name)
        write(module)
        return module

    return Library(make, cache=_kept, key=name)


def _compile(text: str) -> bytes:
    """An object file."""
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError) as error:
        problem = "llvmlite, which compiles the CPU's kernels, is installed but does not load: reinstall or remove it"
        raise RuntimeError(f"{problem} ({error})") from error
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, reloc="pic",
        codemodel="small",
    )  # fmt: skip
    module = llvm.parse_assembly(text)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    return code


def _read(path: Path) -> bytes | None:
    """None for a file that is not what was written: half a kernel would end the process."""
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
