"""`Octavo` of LlamaIndex keeps the contract, and what is its own besides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.llms.octavo import Octavo
from llama_index_contract import LLMContract
from octavo import LLM


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[LLM]:
    """The default model stays loaded while this file runs."""
    with LLM() as llm:
        yield llm


class TestOctavo(LLMContract):
    @pytest.fixture
    def llm(self) -> Octavo:
        return Octavo(max_tokens=12, temperature=0)

    def requests_open(self, llm: Any) -> int:
        stats = llm.engine.stats()
        return int(stats.running + stats.waiting)
