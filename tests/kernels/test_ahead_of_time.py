"""Every kernel compiles for the GPUs it is tuned for, without one of them, and fits into their shared memory."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import octavo_kernels
import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have, from the programming guide
# 89 stands for the consumer chips, which share one set of small tiles; attention and products differ from sm_80's there
CONSUMER = {89: 99 * 1024}
# Instructions on numbers of FP8, from compute capability 8.9 on: the attention kernels turn them into others before any
# product, the one that writes the cache saturates.
FP8 = {"attention": {"cvt.rn.f16x2.e4m3x2"}, "layers": {"cvt.rn.satfinite.e4m3x2.f32"}, "products": set(),
       "sampling": set()}

EXPECTED = {
    "attention": {"paged_attention_kernel", "join_splits_kernel", "shared_splits_kernel"},
    "layers": {
        "add_rms_norm_kernel", "silu_and_mul_kernel", "rope_and_cache_kernel", "step_inputs_kernel",
        "enter_blocks_kernel", "find_broken_kernel", "row_linear_kernel",
    },
    "products": {"invariant_linear_kernel"},
    "sampling": {
        "best_of_tile_kernel", "best_of_row_kernel", "best_in_tile_kernel", "note_best_kernel", "filter_kernel",
        "forbid_tokens_kernel",
    },
}


def compiled(arch: int, group: str) -> list[dict]:
    """In a process of its own: launchers are patched there, and the kernels must not be in interpreter mode."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(octavo_kernels.__file__).parents[1])
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(arch), group]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("group", EXPECTED)
def test_kernels_compile_and_fit(group: str) -> None:
    limits = SHARED_LIMIT | (CONSUMER if group in ("attention", "products") else {})
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(limits, pool.map(lambda arch: compiled(arch, group), limits), strict=True))
    for arch, kernels in results.items():
        assert {kernel["name"] for kernel in kernels} == EXPECTED[group], arch
        for kernel in kernels:
            assert kernel["cubin"] > 0
            assert kernel["shared"] <= limits[arch], (arch, kernel)
        assert {name for kernel in kernels for name in kernel["fp8"]} == (FP8[group] if arch >= 89 else set()), arch


def test_all_kernels_are_listed() -> None:
    folder = Path(octavo_kernels.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*_triton.py"))
    defined = {line.split("(")[0].removeprefix("def ") for line in text.splitlines() if line.startswith("def ")}
    assert {name for name in defined if name.endswith("_kernel")} == set().union(*EXPECTED.values())
