"""Every notebook runs from top to bottom, offline, and is committed with its outputs; a kernel stays healthy when cells
run twice, are interrupted, or close the engine and load again."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
NO_NETWORK = (
    "import socket as _s\n"
    "def _refuse(host, *a, **k): raise OSError(f'no look-up of {host!r} in a notebook')\n"
    "_s.getaddrinfo = _s.gethostbyname = _refuse\n"
)


@pytest.fixture(autouse=True)
def own_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of this very Python, and no file outside of the test's folder."""
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    for name in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


def test_there_are_four() -> None:
    assert [name[0] for name in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_from_top_to_bottom_offline(name: str, default_model: Path) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(NO_NETWORK))
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()  # raises when a cell does
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(outputs) >= 4
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_with_its_outputs(name: str) -> None:
    text = (FOLDER / name).read_text()
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "run it before it is committed"
    shown = [cell for cell in code if cell.outputs]
    assert len(shown) >= len(code) // 2
    assert not [one for cell in code for one in cell.outputs if one.output_type == "error"]
    assert len(text) < 400_000
    for place in (str(Path.home()) + "/", "/tmp/", socket.gethostname() + "."):
        assert place not in text, f"{name} names a place of the machine it ran on: {place}"


class Kernel:
    """A kernel to which a test sends cells, as a person would."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=dict(os.environ))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.manager.provisioner.process.pid)  # type: ignore[union-attr]

    def run(self, code: str) -> str:
        """What the cell printed. Raises AssertionError with its traceback if it failed."""
        reply, printed = self._execute(code)
        assert reply["status"] == "ok", "\n".join(reply.get("traceback", []))
        return printed

    def interrupted_after(self, seconds: float, code: str) -> dict[str, Any]:
        message = self.client.execute(code, stop_on_error=False)  # or it drops what comes next
        time.sleep(seconds)
        self.manager.interrupt_kernel()
        return self._reply(message)

    def _execute(self, code: str) -> tuple[dict[str, Any], str]:
        printed: list[str] = []

        def hook(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, timeout=120, output_hook=hook)
        return reply["content"], "".join(printed)

    def _reply(self, message: str) -> dict[str, Any]:
        while True:
            reply = self.client.get_shell_msg(timeout=60)
            if reply["parent_header"].get("msg_id") == message:
                content: dict[str, Any] = reply["content"]
                return content

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(own_jupyter: None, default_model: Path) -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


LOAD = "from octavo import LLM, SamplingParams\nllm = LLM()\n"


def test_the_load_cell_twice_loads_once(kernel: Kernel) -> None:
    kernel.run(LOAD)
    size = kernel.process.memory_info().rss
    kernel.run(LOAD)
    grown = kernel.process.memory_info().rss - size
    users = kernel.run("from octavo.engine import registry\nprint(len(registry._engines), llm.engine.users)")
    assert users.split()[0] == "1"
    assert grown < 60 << 20, f"a second run of the cell took {grown >> 20} MiB"


def test_an_interrupted_cell_leaves_the_kernel_and_the_engine_healthy(kernel: Kernel) -> None:
    kernel.run(LOAD)
    endless = "llm.generate(['An endless story:'] * 8, SamplingParams(max_tokens=4000, ignore_eos=True))"
    reply = kernel.interrupted_after(2.0, endless)
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    streamed = "for piece in llm.stream('An endless story:', SamplingParams(max_tokens=4000, ignore_eos=True)): pass"
    assert kernel.interrupted_after(1.0, streamed)["ename"] == "KeyboardInterrupt"
    assert kernel.run("print(llm.stats().blocks_used, llm.stats().running)").split() == ["0", "0"]
    again = "print(llm.generate('Two and two is', SamplingParams(max_tokens=4))[0].finished)"
    assert kernel.run(again).strip() == "True"


def test_close_gives_the_memory_back_and_loading_again_works(kernel: Kernel) -> None:
    ask = "llm.generate('Hello', SamplingParams(max_tokens=8))"
    kernel.run(f"{LOAD}{ask}\nllm.close()")  # libraries are loaded now
    base = kernel.process.memory_info().rss
    for _ in range(3):
        kernel.run(LOAD + ask)
        full = kernel.process.memory_info().rss
        kernel.run("llm.close()")
        left = kernel.process.memory_info().rss
        assert full - base > 50 << 20, "there was nothing to give back"
        assert left - base < 24 << 20, f"{(left - base) >> 20} MiB stayed after close()"
