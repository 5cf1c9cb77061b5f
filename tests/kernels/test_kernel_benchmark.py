"""`benchmarks/kernels.py` has every operator, and its cases run: by the twins, in the interpreter, on a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import octavo_kernels
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPERATORS = {name for name in octavo_kernels.__all__ if f"{name}_reference" in octavo_kernels.__all__}


def kernels(*arguments: str, interpret: bool = False) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "kernels.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def check_lines(lines: list[str]) -> None:
    assert {line.split()[0] for line in lines} == OPERATORS | {"F.linear"}
    assert len(lines) == len(set(lines)), "two cases of one name"
    for words in ("soft cap", "window", "sharing", "prefill", "top-p", "gate_up", "greedy", "FP8", "ALiBi"):
        assert any(words in line for line in lines), words


def test_every_operator_has_cases_and_they_run() -> None:
    check_lines(kernels("--check"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the case above has run the kernels themselves")
def test_the_cases_run_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    check_lines(kernels("--check", interpret=True))


def test_only_picks_cases() -> None:
    lines = kernels("--check", "--only", "linear")
    assert {line.split()[0] for line in lines} == {"row_linear", "F.linear", "invariant_linear"}


def test_bytes_and_operations_are_those_of_the_shapes() -> None:
    """Of `FULL`, worked out by hand; nothing of that size is made here, but for the smallest."""
    code = """
import json, sys, torch
from dataclasses import replace
from kernel_cases import FULL, LARGE, SMALL, Cases
plan = replace(FULL, cold=0, products=FULL.products[:1], rows=(16,), batches=(1,), sharing=(3, 512, 544))
cases = Cases(plan, torch.device("cpu"))
found = {case.shape: (case.size, case.operations) for case in cases.products()}
attended = [cases.attend(SMALL, "", [(1, 100)] * 2), cases.attend(SMALL, "", [(1, 100)] * 2, window=60),
            cases.attend(SMALL, "", [(4, 4)]), *cases.sharing()]
print(json.dumps([found, [(case.size, case.operations) for case in attended]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False, cwd=BENCHMARKS
    )
    assert done.returncode == 0, done.stderr
    found, attended = json.loads(done.stdout)
    # 2048 + 2 * 1024 outputs of 1024 inputs; a row, its norm and what comes out
    assert found["qwen3-0.6b qkv 1024 -> 4096"] == [2 * (4096 * 1024 + 2 * 1024 + 4096), 2 * 4096 * 1024]
    # gated: half of the outputs come out; the next: with the residual stream
    assert found["qwen3-0.6b gate_up 1024 -> 6144"] == [2 * (6144 * 1024 + 2 * 1024 + 3072), 2 * 6144 * 1024]
    assert found["qwen3-0.6b down 3072 -> 1024"] == [2 * (3072 * 1024 + 3072 + 2 * 1024), 2 * 3072 * 1024]
    assert found["qwen3-0.6b out 2048 -> 1024 rows=16"] == [
        2 * (2048 * 1024 + 16 * (2048 + 1024)), 2 * 16 * 2048 * 1024,
    ]  # fmt: skip
    token, query = 2 * 2 * 8 * 128, 2 * 2 * 16 * 128  # bytes of a key with its value, of a query with its result
    assert attended[0] == [200 * token + 2 * query, 4 * 16 * 128 * 200]
    assert attended[1] == [120 * token + 2 * query, 4 * 16 * 128 * 120]
    assert attended[2] == [4 * token + 4 * query, 4 * 16 * 128 * 10]
    shared, alone = attended[3:5]
    assert shared == alone == [(512 + 3 * 32) * token + 3 * query, 4 * 16 * 128 * 3 * 544]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    lines = kernels("--only", "row_linear", "--json", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 12
    assert len(lines) == 13
    for row in rows:
        assert row["kernel"] == "row_linear"
        assert 0 < row["limit_microseconds"] < row["microseconds"] < 1e4, "weights come from memory, not from a cache"
    assert re.search(r"row_linear .* us .* MB .* GF limit .* us +\d+\.\d%$", lines[1])
