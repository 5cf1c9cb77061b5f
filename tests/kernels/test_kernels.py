"""Starts the kernel cases of `on_device/`, one process a file, and wants them to pass without a skip.

A process of its own, because Triton decides when it is imported whether kernels are interpreted, its own library
included: the variable must be set before anything else in the process has imported Triton, and the rest of this suite
must see CPU tensors go to the twins. On a machine with a GPU the same cases run there, compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import octavo_kernels
import pytest
import torch

FOLDER = Path(__file__).parent / "on_device"
FILES = sorted(path.name for path in FOLDER.glob("cases_*.py"))


@pytest.fixture(scope="module")
def no_gpu_unless_asked_for() -> None:
    """The cases ask for it."""


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_cases_pass(file: str) -> None:
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(octavo_kernels.__file__).parents[1]), environment.get("PYTHONPATH", "")])
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(FOLDER / file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= 5
    assert " skipped" not in done.stdout


def test_every_operator_has_cases() -> None:
    text = "".join((FOLDER / file).read_text() for file in FILES)
    operators = [name for name in octavo_kernels.__all__ if f"{name}_reference" in octavo_kernels.__all__]
    assert len(operators) == 13
    assert [name for name in operators if f"{name}_triton" not in text] == []
