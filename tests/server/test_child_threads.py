"""Threads of torch in an engine's process leave the cores to others when they have nothing to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from octavo.engine.child.processes import EngineProcess
from octavo.host import usable_cores

PROGRAM = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(2)
numbers, awake = torch.ones(1 << 20), []
for _ in range(41):
    numbers.add_(1)
    before = time.process_time()
    time.sleep(0.03)
    awake.append(time.process_time() - before)
Path(sys.argv[1]).write_text(str(sorted(awake)[20]))
"""

pytestmark = [
    pytest.mark.skipif(
        not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="of GNU's OpenMP, which this torch has not"
    ),
    pytest.mark.skipif(usable_cores() < 2, reason="with more threads than cores it lets none stay awake"),
]


def seconds_awake(folder: Path) -> float:
    """Processor time of a process in the pauses between two operators, each."""
    found = folder / "seconds"
    process = EngineProcess([sys.executable, "-c", PROGRAM, str(found)])
    try:
        process._process.wait(60)
    finally:
        process.kill()
    return float(found.read_text())


def test_they_sleep_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    soon = seconds_awake(tmp_path)
    monkeypatch.setenv("GOMP_SPINCOUNT", "30000000")  # what who starts a server has chosen counts
    late = seconds_awake(tmp_path)  # all of a pause
    assert soon < late / 4, (soon, late)
