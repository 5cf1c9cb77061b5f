"""Memory of the process: large pages for weights and cache, and how all of it goes back to the system when an engine
closes. Used where an engine is started and closed.

glibc keeps what is freed at the end of a heap below a threshold, and maps large blocks by themselves above another. It
raises both whenever a large block is freed, to 64 and 32 MiB, and asking trims the end of the main thread's heap alone.
So each engine after the first would lie in the heaps of its threads, and 20 to 46 MB of the default model stay after
every other close (`benchmarks/memory.py`). Therefore: while an engine is started, large blocks are mapped and what is
freed goes back; while it lets go of things too; in between the thresholds are the highest, so that what a step frees
(logits, activations) stays at hand for the next.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_SMALL, _LARGE = 256 * 2**10, 32 * 2**20

_lock = Lock()
_inside = 0


@contextmanager
def memory_goes_back() -> Iterator[None]:
    """What is freed inside, on whatever thread, goes back to the system; so does, whenever it is freed, a block of some
    size that is allocated inside."""
    global _inside
    with _lock:
        _inside += 1
        _set_thresholds(mapped_from=_SMALL, trimmed_from=_SMALL)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _set_thresholds(mapped_from=_LARGE, trimmed_from=2 * _LARGE)
        if (glibc := _glibc()) is not None:
            glibc.malloc_trim(0)  # what lies free between other things, too: 25 MB after a start, in 3 ms


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection of unreachable cycles inside: a start makes some 300 000 objects that stay (torch's modules, a
    vocabulary and its merges), and looking through them again and again took 0.25 of 1.7 s. Afterwards all count as
    old, or the next collection of young objects would begin with these, for 0.09 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if was_enabled:
            gc.enable()


def give_back_memory() -> None:
    """Collect what is unreachable and return free memory to the system and to the GPU."""
    with memory_goes_back():
        gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a device that is lost gives nothing back before the process ends
            torch.cuda.empty_cache()


def zero_pages(size: int, *, large: bool) -> torch.Tensor:
    """`size` bytes of zeros, uint8, in pages of their own that take memory when they are first touched. `large`: in
    pages of 2 MiB, where the system has them: a prompt of 1024 tokens that fills a new cache took 570 ms with small
    pages, 515 with large ones."""
    import torch

    if sys.platform != "linux":
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        if large:
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _set_thresholds(*, mapped_from: int, trimmed_from: int) -> None:
    if (glibc := _glibc()) is not None:
        glibc.mallopt(_M_MMAP_THRESHOLD, mapped_from)
        glibc.mallopt(_M_TRIM_THRESHOLD, trimmed_from)


def _glibc() -> ctypes.CDLL | None:
    """None where the C library is another, which has its own ways."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            if library.mallopt and library.malloc_trim:
                return library
    return None
