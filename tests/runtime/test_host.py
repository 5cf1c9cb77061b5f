"""Cores and memory that a container leaves to this process, from trees of files as the kernel shows them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo import host
from octavo.execute import build
from octavo.host import free_memory, usable_cores

GIB = 2**30
MANY = 64


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(MANY)), raising=False)


def machine(root: Path, group: str, files: dict[str, str]) -> Path:
    """`group`: what /proc/self/cgroup says; `files`: by their place below /sys/fs/cgroup. 64 GiB, 40 of them free."""
    meminfo = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {40 * GIB // 1024} kB\n"
    system = {"proc/self/cgroup": group, "proc/meminfo": meminfo}
    for name, text in (system | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V1 = "5:cpuset:/\n4:memory:/box/inner\n2:cpu,cpuacct:/box/inner"


@pytest.mark.parametrize(("group", "files", "cores"), [
    ("0::/", {}, MANY),
    ("0::/", {"cpu.max": "max 100000"}, MANY),
    ("0::/", {"cpu.max": "150000 100000"}, 2),
    ("0::/", {"cpu.max": "20000 100000"}, 1),
    ("0::/", {"cpu.max": "6400000 100000"}, MANY),
    ("0::/", {"cpu.max": "9900000 100000"}, MANY),
    ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),
    ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "300000 100000"}, 3),
    ("0::/not/in/here", {"cpu.max": "250000 50000"}, 5),
    ("0::/../sibling", {"cpu.max": "200000 100000"}, 2),
    ("0::/", {"cpu.max": "nonsense"}, MANY),
    ("0::/", {"cpu.max": "100000 0"}, MANY),
    (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, MANY),
    (V1, {"cpu/box/inner/cpu.cfs_quota_us": "250000", "cpu/box/inner/cpu.cfs_period_us": "100000"}, 3),
    (V1, {"cpu/box/cpu.cfs_quota_us": "100000", "cpu/box/cpu.cfs_period_us": "100000"}, 1),
    (V1 + "\n0::/", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ("", {"cpu.max": "100000 100000"}, MANY),
], ids=str)  # fmt: skip
def test_cores_of_a_container(group: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, group, files)) == cores


@pytest.mark.parametrize(("group", "files", "free", "total"), [
    ("0::/", {}, 40, 64),
    ("0::/", {"memory.max": "max", "memory.current": str(GIB)}, 40, 64),
    ("0::/", {"memory.max": str(8 * GIB), "memory.current": str(3 * GIB)}, 5, 8),
    ("0::/", {"memory.max": str(8 * GIB), "memory.current": str(3 * GIB),
              "memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 9"}, 6, 8),
    ("0::/", {"memory.max": str(8 * GIB), "memory.current": str(9 * GIB)}, 0, 8),
    ("0::/", {"memory.max": str(8 * GIB), "memory.high": str(6 * GIB), "memory.current": str(GIB)}, 5, 6),
    ("0::/", {"memory.max": str(128 * GIB), "memory.current": str(GIB)}, 40, 64),
    ("0::/a/b", {"a/memory.max": str(4 * GIB), "a/memory.current": str(3 * GIB),
                 "a/b/memory.max": str(2 * GIB), "a/b/memory.current": "0"}, 1, 2),
    ("0::/not/in/here", {"memory.max": str(4 * GIB), "memory.current": "0"}, 4, 4),
    (V1, {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": str(GIB)}, 40, 64),
    (V1, {"memory/box/memory.limit_in_bytes": str(3 * GIB), "memory/box/memory.usage_in_bytes": str(2 * GIB),
          "memory/box/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}"}, 2, 3),
], ids=str)  # fmt: skip
def test_memory_of_a_container(group: str, files: dict[str, str], free: int, total: int, tmp_path: Path) -> None:
    assert free_memory(machine(tmp_path, group, files)) == (free * GIB, total * GIB)


@given(st.lists(st.tuples(st.integers(1, 10**7), st.integers(1000, 10**6)) | st.none(), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_the_smallest_quota_on_the_way_to_the_root_counts(quotas: list[tuple[int, int] | None]) -> None:
    names = ["/".join("abcdef"[:depth]) for depth in range(len(quotas))]
    files = {
        f"{name}/cpu.max".lstrip("/"): f"{quota[0] if quota else 'max'} {quota[1] if quota else 100000}"
        for name, quota in zip(names, quotas, strict=True)
    }
    expected = min([MANY, *(math.ceil(quota[0] / quota[1]) for quota in quotas if quota)])
    with tempfile.TemporaryDirectory() as folder:
        assert usable_cores(machine(Path(folder), f"0::/{names[-1]}", files)) == expected


@given(st.binary(max_size=60), st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_content_of_these_files_gives_an_answer(group: bytes, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = machine(Path(folder), "0::/", {"cpu.max": "", "memory.max": "", "memory.current": "", "memory.stat": ""})
        for name in ("cpu.max", "memory.max", "memory.current", "memory.stat"):
            (root / "sys/fs/cgroup" / name).write_bytes(content)
        assert 1 <= usable_cores(root) <= MANY
        free, total = free_memory(root)
        assert free <= total
        (root / "proc/self/cgroup").write_bytes(group)
        assert 1 <= usable_cores(root) <= MANY


def test_the_affinity_counts_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_cores(machine(tmp_path, "0::/", {"cpu.max": "800000 100000"})) == 2


def test_a_system_without_these_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on macOS: no affinity, no /proc, and sysconf does not tell what is free."""
    monkeypatch.delattr(host.os, "sched_getaffinity", raising=False)
    figures = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}

    def sysconf(name: str) -> int:
        if name not in figures:
            raise ValueError("unrecognized configuration name")
        return figures[name]

    monkeypatch.setattr(host.os, "sysconf", sysconf)
    assert usable_cores(tmp_path) == os.cpu_count()
    assert free_memory(tmp_path) == (4096000, 4096000)


def test_this_machine() -> None:
    free, total = free_memory()
    assert 0 < free < total


@pytest.fixture
def two_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_torch_threads")
@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (64, 2)])
def test_an_engine_lowers_torchs_threads_and_never_raises_them(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "usable_cores", lambda: cores)
    assert build.limit_torch_threads() == threads
    assert torch.get_num_threads() == threads


THREADS = """
import sys, torch
from octavo import LLM
from octavo.execute import build
build.usable_cores = lambda: int(sys.argv[2])
if sys.argv[3] != "-":
    torch.set_num_threads(int(sys.argv[3]))
with LLM(sys.argv[1]) as llm:
    print(llm.engine.service.call(lambda core: torch.get_num_threads()))
"""


@pytest.mark.parametrize(("cores", "chosen", "variable", "threads"), [
    ("2", "1", "4", "1"), ("2", "-", "1", "1"), ("2", "-", "4", "2"), ("3", "4", "1", "3"),
])  # fmt: skip
def test_threads_of_an_engine(cores: str, chosen: str, variable: str, threads: str, tiny_model: Path) -> None:
    """`chosen`: by torch.set_num_threads on the user's thread; `variable`: OMP_NUM_THREADS."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(tiny_model), cores, chosen], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": variable}, timeout=200,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, threads), done.stderr


OLD = """
import sys
from octavo_kernels.cpu import compiler, processor
processor._cpuinfo = lambda: ("an old one", frozenset({"sse4_2", "avx", "avx2", "fma", "f16c"}))
for asked in (processor.cpu_flags, compiler.available):
    asked.cache_clear()
import torch
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
from octavo import LLM, SamplingParams
with LLM(sys.argv[1]) as llm:
    assert (llm.engine.limits.dtype, llm.engine.limits.packed) == ("float32", False)
    print(llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text)
"""


@pytest.mark.skipif(not host.sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="of x86 CPUs")
def test_a_cpu_with_avx2_only_answers(default_model: Path) -> None:
    """torch and oneDNN are held to AVX2, and the processor reports no more."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", OLD, str(default_model)], capture_output=True, text=True, check=False, env=environment,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
