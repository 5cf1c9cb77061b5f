"""Memory maps of files that are read once. Used by the readers of weights."""

from __future__ import annotations

import mmap


def drop_pages(data: mmap.mmap, start: int, end: int) -> None:
    """Bytes `start` to `end` were copied: take their pages out of this process, so that it does not hold file and copy
    at once. The system may keep them, and a later read finds them again. Pages shared with other bytes stay."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            data.madvise(mmap.MADV_DONTNEED, first, length)
