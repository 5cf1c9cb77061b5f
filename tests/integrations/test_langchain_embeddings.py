"""LangChain's own suites for embeddings on `OctavoEmbeddings`, and what they do not ask."""

from __future__ import annotations

import asyncio
import gc

import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_octavo import OctavoEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from octavo import ConfigError, EngineClosedError
from octavo.engine import registry
from octavo.models.sources import EMBEDDING_MODEL


class TestUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[OctavoEmbeddings]:
        return OctavoEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, str]:
        return {"model": EMBEDDING_MODEL}


class TestIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[OctavoEmbeddings]:
        return OctavoEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, str]:
        return {"model": EMBEDDING_MODEL}


def test_constructing_loads_nothing_and_equal_ones_share() -> None:
    gc.collect()  # those of the tests above
    one, two = OctavoEmbeddings(), OctavoEmbeddings(document_prompt_name=None)
    assert not one._shared().started
    assert one.embed_query("a") == two.embed_query("a")
    assert one._shared().llm is two._shared().llm
    config = one._shared().config
    one.close()
    assert config in registry.running()
    two.close()
    assert config not in registry.running()


async def test_concurrent_queries_share_batches() -> None:
    embeddings = OctavoEmbeddings()
    before = embeddings._shared().llm.stats().steps
    await asyncio.gather(*(embeddings.aembed_query(f"query {n}") for n in range(30)))
    stats = embeddings._shared().llm.stats()
    assert stats.steps - before < 20
    assert stats.largest_batch > 4
    embeddings.close()


def test_a_vector_store_finds_what_is_meant() -> None:
    embeddings = OctavoEmbeddings()
    store = InMemoryVectorStore.from_texts(
        ["Cats purr when they are content.", "A bicycle has two wheels.", "The Nile flows through Egypt."], embeddings
    )
    (found,) = store.similarity_search("Which animal makes a pleased sound?", k=1)
    assert found.page_content.startswith("Cats")
    embeddings.close()


def test_settings_by_name_and_copies_are_users_of_their_own() -> None:
    named = OctavoEmbeddings(dtype="bfloat16", max_model_len=32)
    assert named.engine_kwargs == {"dtype": "bfloat16", "max_model_len": 32}
    copied = named.model_copy(update={"query_prompt_name": None})
    vector = named.embed_query("a")
    assert copied.embed_query("a") == vector
    named.close()
    assert copied.embed_query("a") == vector
    assert copied.stats().steps == 3
    copied.close()
    with pytest.raises(EngineClosedError):
        copied.embed_query("a")


def test_no_secret_is_shown_and_unknown_settings_are_refused() -> None:
    secret = OctavoEmbeddings(token="hf_secret")  # type: ignore[arg-type]
    assert "hf_secret" not in repr(secret) + secret.model_dump_json()
    with pytest.raises(ConfigError, match="dtyp"):
        OctavoEmbeddings(engine_kwargs={"dtyp": "float32"})
    with pytest.raises(ValueError, match="modle"):
        OctavoEmbeddings(modle="x")
