"""Threads of torch in an engine's process leave the cores to others when they have nothing to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from octavo.engine.child.processes import EngineProcess
from octavo.host import usable_cores

PROGRAM = """
import os, sys, time, torch
from pathlib import Path
torch.set_num_threads(2)
numbers, awake = torch.ones(1 << 20), []
for _ in range(41):
    numbers.add_(1)
    before = time.process_time()
    time.sleep(0.03)
    awake.append(time.process_time() - before)
Path(sys.argv[1]).write_text(f"{sorted(awake)[20]} {os.environ['GOMP_SPINCOUNT']}")
"""

pytestmark = [
    pytest.mark.skipif(
        not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="of GNU's OpenMP, which this torch has not"
    ),
    pytest.mark.skipif(usable_cores() < 2, reason="with more threads than cores it lets none stay awake"),
]


def seconds_awake(folder: Path) -> tuple[float, int]:
    """Processor time of a process in the pauses between two operators, each, and the turns that its threads were told
    to stay awake for."""
    found = folder / "seconds"
    process = EngineProcess([sys.executable, "-c", PROGRAM, str(found)])
    try:
        process._process.wait(60)
    finally:
        process.kill()
    seconds, turns = found.read_text().split()
    return float(seconds), int(turns)


def test_they_sleep_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    soon, turns = seconds_awake(tmp_path)
    assert turns == 2000  # OpenMP's own number is 300,000: whether they show in a pause is up to the machine
    monkeypatch.setenv("GOMP_SPINCOUNT", "30000000")
    late, turns = seconds_awake(tmp_path)
    assert turns == 30000000, "what who starts a server has chosen counts"
    assert soon < late / 100, (soon, late)  # of which it is all of a pause
