"""Fixtures that several floors share: the default model, and one tiny model."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# Products of tiny models take microseconds; on a busy machine each would wait for a second thread to be scheduled,
# fifty times as long. Set before torch is imported; a test that needs threads sets them itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(Path(__file__).parent / "runtime"))


@pytest.fixture(autouse=True, scope="module")
def no_gpu_unless_asked_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests are of the CPU but for those marked `gpu`: where there is a GPU, engines would take it by themselves, and
    so would the processes that a test starts."""
    if request.node.get_closest_marker("gpu") is not None:
        yield
        return
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


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


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in a folder of its own: no other test has an engine of it, however long that stays."""
    return shutil.copytree(tiny_model, tmp_path / "own")
