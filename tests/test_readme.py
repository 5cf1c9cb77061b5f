"""The README is true: its Python snippets run, in order, in one process; its `octavo` lines are real commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.S)


def test_python_snippets_run(default_model: Path) -> None:
    snippets = blocks("python")
    assert len(snippets) >= 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The capital of France is" in done.stdout


@pytest.mark.parametrize("line", re.findall(r"^\$ (octavo [^#\n]*)", README.read_text(), flags=re.M))
def test_commands_exist(line: str) -> None:
    command = line.split()[1]
    done = subprocess.run(
        [sys.executable, "-m", "octavo", command, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_the_picture_is_there() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file()
