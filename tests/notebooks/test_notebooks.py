"""Every notebook runs from top to bottom, offline, and has its outputs in its file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

from execute import execute, tidy  # noqa: E402

FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise OSError(f"a notebook must not look up {args[:1]}")
socket.getaddrinfo = socket.gethostbyname = socket.gethostbyname_ex = refuse
"""


def read(file: Path) -> Any:
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return notebook


def kinds(cell: Any) -> set[str]:
    """What a cell shows: streams by name, else the richest form there is."""
    found = set()
    for output in cell.outputs:
        data = output.get("data", {})
        rich = next((kind for kind in ("image/png", "text/html", "text/plain") if kind in data), None)
        found.add(rich or output.get("name", output.output_type))
    return found


def test_there_are_four() -> None:
    assert [file.name[:2] for file in FILES] == ["1_", "2_", "3_", "4_"]


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment in which no name can be looked up: Python runs `sitecustomize` at its start."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    code = "import socket; socket.getaddrinfo('localhost', 80)"
    tried = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "must not look up" in tried.stderr
    return environment


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs_and_its_outputs_are_in_the_file(
    file: Path, default_model: Path, offline: dict[str, str]
) -> None:
    committed = read(file)
    made = execute(file, offline)
    for kept, cell in zip(committed.cells, made.cells, strict=True):
        if cell.cell_type == "code":
            assert "error" not in kinds(cell)
            assert "stderr" not in kinds(cell), cell.outputs
            assert kinds(kept) == kinds(cell), f"run notebooks/execute.py: {cell.source}"
            assert kept.execution_count == cell.execution_count


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_holds_nothing_of_one_machine(file: Path) -> None:
    text = file.read_text()
    assert tidy(read(file)) == read(file), "run notebooks/execute.py"
    assert not re.search(r"/(home|root|tmp|work|Users)/|\\\\Users\\\\", text)
    assert len(text) < 250_000
    assert set(json.loads(text)["metadata"]) == {"kernelspec", "language_info"}
