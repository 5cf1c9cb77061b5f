"""Fixtures that several floors share: the default model, and one tiny model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Products of tiny models take microseconds; on a busy machine each would wait for a second thread to be scheduled,
# fifty times as long. Set before torch is imported; a test that needs threads sets them itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(Path(__file__).parent / "runtime"))


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The real default model: fetched once by its ordinary way, then found in the cache."""
    from octavo.models.sources import DEFAULT_MODEL, resolve

    return resolve(DEFAULT_MODEL).path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with random weights and a real tokenizer of 300 tokens."""
    from tiny_models import make_model

    return make_model("llama-head-dim", tmp_path_factory.mktemp("tiny"))
