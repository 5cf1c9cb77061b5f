"""Runs notebooks from top to bottom: `python notebooks/execute.py [file ...]` writes their outputs into the files.

The tests run them by the same functions and write nothing. The kernel is this Python; whatever Jupyter and IPython keep
goes into a folder that is thrown away.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_client.utils import run_sync
from nbclient import NotebookClient

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
}


class ThisPython(KernelSpecManager):
    """Knows one kernel, the Python that runs this; nothing has to be installed for it."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def kernel_settings(folder: Path) -> dict[str, Any]:
    """Arguments of a `KernelManager` whose files stay in `folder`."""
    return {
        "kernel_name": "python3", "kernel_spec_manager": ThisPython(), "connection_file": str(folder / "kernel.json"),
    }  # fmt: skip


def kernel_environment(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """What the kernel's process sees: `environment`, with IPython's own files in `folder`."""
    return environment | {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder)}


def start_kernel(folder: Path, environment: dict[str, str]) -> KernelManager:
    """A kernel that is driven by hand."""
    manager = KernelManager(**kernel_settings(folder))
    manager.start_kernel(env=kernel_environment(folder, environment), cwd=str(HERE))
    return manager


def execute(file: Path, environment: dict[str, str], *, seconds_a_cell: int = 300) -> nbformat.NotebookNode:
    """The notebook with fresh outputs. Raises `CellExecutionError` at the first cell that fails."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manager = AsyncKernelManager(**kernel_settings(folder))
        client = NotebookClient(
            notebook, km=manager, timeout=seconds_a_cell, resources={"metadata": {"path": str(file.parent)}},
            record_timing=False,
        )  # fmt: skip
        try:
            client.execute(env=kernel_environment(folder, environment))
        finally:
            run_sync(manager.shutdown_kernel)(now=True)  # nbclient leaves a manager that was given to it alone
    return tidy(notebook)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what belongs to one machine or one run: paths, versions, times, ids that change; pieces of one stream
    become one output."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == "stream" == kept[-1].output_type and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
        if "data" in output and "text/plain" in output.data:
            output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", output.data["text/plain"])
    return kept


def main(names: list[str]) -> None:
    for file in map(Path, names) if names else sorted(HERE.glob("*.ipynb")):
        nbformat.write(execute(file, dict(os.environ)), file)
        print(file)


if __name__ == "__main__":
    main(sys.argv[1:])
