"""Retrieval over a real document, offline, on a vector database that keeps its files: see `rag_program.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("rag_program.py")


def run(what: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), what, str(folder)], capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("vectors")
    return folder, run("build", folder)


def test_the_index_is_built_once_by_both(built: tuple[Path, dict[str, Any]]) -> None:
    _, found = built
    assert found["kept"][0] >= 60
    assert found["kept"][1] == 60
    assert found["steps"] > 0
    assert found["looked up"] == []


def test_after_a_restart_both_answer_without_embedding_again(built: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = built
    found = run("ask", folder)
    assert found["looked up"] == []
    assert found["steps before a question"] == 0
    assert found["steps"] < 12  # a step for each question, of which there are six or so
    for text in (found["source"], found["page"]):
        assert "Senator" in text
    assert "thirty Years" in found["source"] + found["page"]
    assert found["pieces"] > 3
    assert found["chunks"] > 3
    assert found["history"] == ["user", "assistant"] * 2
    assert found["answer"]
    assert found["asked"] >= 1, "the agent did not use its tool"
    assert found["agent"]
    assert found["one engine"], "LangChain and LlamaIndex loaded the model twice"
