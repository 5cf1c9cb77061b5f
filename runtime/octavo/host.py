"""What this process may use of the machine: cores and memory, as its container allows and not as the host has them.

A control group limits everything inside it, so the smallest limit on the way from the process's group to the root
counts. Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max, memory.max, memory.high); version 1:
https://docs.kernel.org/scheduler/sched-bwc.html and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html. The
group's path in `/proc/self/cgroup` can be one of the host that does not exist in here (a container without a cgroup
namespace); its own group is then what is mounted at `/sys/fs/cgroup`, the end of the same way.

`root` is where the files of the system are.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("sys/fs/cgroup")


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process can keep busy: those it may run on, at most the time that its container may take."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    shares = [math.ceil(share) for share in _cpu_shares(root)]
    return max(min([cores, *shares]), 1)


def free_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(free, total) bytes of RAM for this process."""
    free, total = system_memory(root)
    for limit, used in _memory_limits(root):
        total = min(total, limit)
        free = min(free, max(limit - used, 0))
    return min(free, total), total


def system_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(free, total) bytes of RAM of the whole machine. What the system says is free counts what it only keeps until
    somebody needs the room (files that were read)."""
    table = _table(root / "proc/meminfo")
    if "MemTotal:" in table and "MemAvailable:" in table:
        return table["MemAvailable:"] * 1024, table["MemTotal:"] * 1024
    if sys.platform == "win32":
        return _windows_memory()
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * page, total
    except (ValueError, OSError):
        return total, total  # macOS does not say: it compresses and swaps before it refuses


def _windows_memory() -> tuple[int, int]:
    """GlobalMemoryStatusEx: a DWORD with the length of the struct, a DWORD, then ullTotalPhys, ullAvailPhys, ..."""
    status = (ctypes.c_uint64 * 8)(ctypes.sizeof(ctypes.c_uint64) * 8)
    ctypes.CDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))
    return status[2], status[1]


def _cpu_shares(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group around this process allows."""
    for folder in _groups(root, ""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        with suppress(ValueError, ZeroDivisionError):  # "max" is no limit
            yield int(quota) / int(period)
    for folder in _groups(root, "cpu"):
        with suppress(ValueError, ZeroDivisionError):
            quota_us = int(_text(folder / "cpu.cfs_quota_us"))
            if quota_us > 0:  # -1 is no limit
                yield quota_us / int(_text(folder / "cpu.cfs_period_us"))


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group around this process. Pages of files that were not read lately are no use:
    the kernel drops them when the group needs the room."""
    for folder in _groups(root, ""):
        for name in ("memory.max", "memory.high"):  # above "high" its processes are slowed down until they free some
            with suppress(ValueError):
                used = int(_text(folder / "memory.current")) - _table(folder / "memory.stat").get("inactive_file", 0)
                yield int(_text(folder / name)), used
    for folder in _groups(root, "memory"):
        with suppress(ValueError):  # no limit is a number beyond all memory
            used = int(_text(folder / "memory.usage_in_bytes"))
            used -= _table(folder / "memory.stat").get("total_inactive_file", 0)
            yield int(_text(folder / "memory.limit_in_bytes")), used


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of all groups around it. `controller`: of version 1; "" for
    version 2, where one tree has all of them (line "0::/path")."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            top = root / _CGROUPS / controller
            # from a group outside its cgroup namespace, a process is told a way up
            inside = Path(path.lstrip("/")) if ".." not in path.split("/") else Path()
            yield from (top / folder for folder in (inside, *inside.parents))


def _text(path: Path) -> str:
    """Nothing where there is no such file."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _table(path: Path) -> dict[str, int]:
    """Lines of a word and a number."""
    table = {}
    for line in _text(path).splitlines():
        with suppress(ValueError):
            name, number, *_ = line.split()
            table[name] = int(number)
    return table
