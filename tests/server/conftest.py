"""The servers that many tests here share: the real program with the real default model, and a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from octavo.models.sources import DEFAULT_MODEL, EMBEDDING_MODEL
from serving_helpers import CHAT, EMBEDDER, InProcess, Program, in_process, program


@pytest.fixture(scope="session")
def server() -> Iterator[Program]:
    """The default model and the sentence embedder behind one port."""
    names = ("--served-model-name", f"{CHAT},default", "--served-model-name", EMBEDDER)
    with program("--model", DEFAULT_MODEL, "--model", EMBEDDING_MODEL, *names, threads=2) as running:
        yield running


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> Iterator[InProcess]:
    """A tiny model, without keys."""
    with in_process(tiny_model, num_blocks=256, block_size=16, max_num_seqs=16) as running:
        yield running
