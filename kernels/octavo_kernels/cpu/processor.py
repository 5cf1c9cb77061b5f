"""What the processor can do, as the system reports it: asked before kernels or types are chosen."""

from __future__ import annotations

import functools
from contextlib import suppress
from pathlib import Path


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets by their names in Linux, "avx2" or "bf16". Empty on other systems."""
    return _cpuinfo()[1]


def cpu_name() -> str | None:
    return _cpuinfo()[0]


def _cpuinfo() -> tuple[str | None, frozenset[str]]:
    name, flags = None, frozenset[str]()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):  # on x86, on ARM
                flags |= frozenset(value.split())
    return name, flags
