"""Embeddings on a machine with an NVIDIA GPU: the vectors of transformers on the CPU, in whatever batch. Skipped
elsewhere."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo import LLM
from tiny_encoders import FAMILIES, POOLINGS, make_encoder, pooled
from tiny_models import TEXT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SHAPE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
         "initializer_range": 0.1, "max_position_embeddings": 512}  # fmt: skip
"""Of MiniLM."""


def texts(count: int) -> list[str]:
    rng = random.Random(count)
    words = " ".join(TEXT).split()
    return [" ".join(rng.choices(words, k=rng.choice([1, 2, 5, 20, 60]))) for _ in range(count)]


def vectors(outputs: Any) -> np.ndarray:
    return np.array([output.embedding for output in outputs])


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("mode", POOLINGS)
def test_families_and_poolings_equal_transformers(kind: str, mode: str, tmp_path: Path) -> None:
    model = make_encoder(kind, mode, tmp_path)
    with LLM(str(tmp_path)) as llm:
        assert (llm.engine.limits.device, llm.engine.limits.dtype) == ("cuda", "float32")
        for output in llm.embed(texts(60)):
            expected = pooled(model, output.prompt_token_ids, mode)
            np.testing.assert_allclose(output.embedding, expected.numpy(), atol=5e-5)


def test_a_text_is_what_it_is_alone_and_on_the_cpu(tmp_path: Path) -> None:
    make_encoder("bert", "mean", tmp_path, **SHAPE)
    many = texts(300)
    with LLM(str(tmp_path)) as gpu, LLM(str(tmp_path), device="cpu") as cpu, LLM(str(tmp_path), dtype="bfloat16") as h:
        together, alone = vectors(gpu.embed(many)), vectors([gpu.embed(text)[0] for text in many[:30]])
        assert gpu.stats().largest_batch > 30
        longest = max(many, key=len)
        again = {vectors(gpu.embed(longest)).tobytes() for _ in range(30)}  # alone: company would change the products
        assert len(again) == 1, "sums in another order"
        elsewhere, half = vectors(cpu.embed(many)), vectors(h.embed(many))
    size = np.abs(elsewhere).max()
    assert np.abs(together[:30] - alone).max() < 1e-5 * size
    assert np.abs(together - elsewhere).max() < 1e-4 * size
    norms = np.linalg.norm(half, axis=1) * np.linalg.norm(elsewhere, axis=1)
    assert ((half * elsewhere).sum(axis=1) / norms).min() > 0.99
    assert not np.array_equal(half, together)


def test_close_gives_the_memory_back(tmp_path: Path) -> None:
    make_encoder("bert", "mean", tmp_path, **SHAPE)
    LLM(str(tmp_path)).close()
    before = torch.cuda.memory_allocated()
    with LLM(str(tmp_path)) as llm:
        llm.embed(texts(100))
        assert torch.cuda.memory_allocated() > before + 2**24
    assert torch.cuda.memory_allocated() <= before + 2**20
