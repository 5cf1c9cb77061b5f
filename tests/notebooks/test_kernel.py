"""What people do to a kernel leaves it healthy: the load cell twice, *Interrupt*, `close()` and load again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("nbclient")

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

from execute import start_kernel

LOAD = "from octavo import LLM, SamplingParams\nllm = LLM(max_num_seqs=16)"
ASK = "print(llm.generate('Once upon a time', SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids)"
LONG = "SamplingParams(max_tokens=7000, ignore_eos=True)"
MEGABYTE = 2**20


class Kernel:
    """A kernel and what a notebook does with it."""

    def __init__(self, folder: Path) -> None:
        self.manager = start_kernel(folder, dict(os.environ))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.process = psutil.Process(int(self.run("import os; print(os.getpid())")))

    def run(self, code: str) -> str:
        """What a cell prints. An error in the cell is an error here."""
        printed: list[str] = []
        reply = self.client.execute_interactive(
            code, timeout=120, output_hook=lambda message: printed.append(message["content"].get("text", ""))
        )
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed).strip()

    def interrupt(self, code: str, when: str) -> dict[str, Any]:
        """Start a cell, interrupt it when it has printed `when`; its reply."""
        number = self.client.execute(code)
        printed = ""
        while when not in printed:
            message = self.client.get_iopub_msg(timeout=60)
            if message["msg_type"] == "stream" and message["parent_header"]["msg_id"] == number:
                printed += message["content"]["text"]
        self.manager.interrupt_kernel()
        while True:
            reply = self.client.get_shell_msg(timeout=30)
            if reply["parent_header"]["msg_id"] == number:
                return dict(reply["content"])

    @property
    def memory(self) -> float:
        """Resident, in MB."""
        return float(self.process.memory_info().rss) / MEGABYTE

    def blocks_used(self) -> int:
        return int(self.run("print(llm.stats().blocks_used)"))

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    kernel.run(LOAD)
    yield kernel
    kernel.stop()


def test_the_load_cell_twice_is_one_engine(kernel: Kernel) -> None:
    answer = kernel.run(ASK)
    kernel.run("first = llm.engine")
    before = kernel.memory
    kernel.run(LOAD)
    kernel.run(LOAD)
    assert kernel.run("print(llm.engine is first, first.users)") == "True 1"
    assert kernel.run(ASK) == answer
    assert kernel.memory - before < 20
    kernel.run("del first")


@pytest.mark.parametrize(
    "cell",
    [
        f"print('begun', flush=True)\nllm.generate(['Once'] * 4, {LONG})",
        f"for piece in llm.generate('Once', {LONG}, stream=True): print('begun', flush=True)",
    ],
    ids=["batch", "stream"],
)
def test_an_interrupted_cell_ends_its_requests_and_nothing_else(kernel: Kernel, cell: str) -> None:
    answer = kernel.run(ASK)
    reply = kernel.interrupt(cell, "begun")
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    kernel.run("import time\nwhile llm.stats().running: time.sleep(0.01)")  # its last step may still run
    assert kernel.blocks_used() == 0
    assert kernel.run("print(llm.stats().waiting)") == "0"
    assert kernel.run(ASK) == answer


def test_an_interrupted_load_can_be_done_again(kernel: Kernel) -> None:
    kernel.run("llm.close()")
    reply = kernel.interrupt(f"print('begun', flush=True)\n{LOAD}", "begun")
    assert reply["status"] in ("ok", "error")  # it may have been quicker
    assert reply.get("ename", "KeyboardInterrupt") == "KeyboardInterrupt"
    kernel.run(LOAD)
    kernel.run(ASK)
    assert kernel.blocks_used() == 0


def test_close_gives_the_memory_back_and_load_again_works(kernel: Kernel) -> None:
    kernel.run(LOAD)
    answer = kernel.run(ASK)
    closed = []
    for _ in range(3):
        kernel.run("llm.generate(['Once'] * 16, SamplingParams(max_tokens=40, ignore_eos=True))")
        assert kernel.blocks_used() == 0
        loaded = kernel.memory
        kernel.run("llm.close()")
        closed.append(kernel.memory)
        assert loaded - closed[-1] > 80, "the weights alone are 90 MB"
        assert "octavo-engine" not in kernel.run("import threading; print(*threading.enumerate())")
        kernel.run(LOAD)
        assert kernel.run(ASK) == answer
    assert closed[-1] - closed[0] < 10, closed


def test_a_closed_model_says_so(kernel: Kernel) -> None:
    kernel.run("llm.close(); llm.close()")
    code = "try:\n    llm.generate('Once')\nexcept Exception as error:\n    print(type(error).__name__)"
    assert kernel.run(code) == "EngineClosedError"
    kernel.run(LOAD)
    kernel.run(ASK)
