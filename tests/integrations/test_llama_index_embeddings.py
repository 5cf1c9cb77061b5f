"""`OctavoEmbedding` in LlamaIndex: shapes, batches, native async, sharing, serialisation."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.embeddings.octavo import OctavoEmbedding
from octavo import ConfigError, RequestError
from octavo.engine import registry


@pytest.fixture(scope="module")
def embedding() -> Iterator[OctavoEmbedding]:
    embedding = OctavoEmbedding()
    yield embedding
    embedding.close()


async def test_all_ways_give_the_same(embedding: OctavoEmbedding) -> None:
    texts = [f"text {n}" for n in range(20)]
    all_at_once = embedding.get_text_embedding_batch(texts)
    assert [len(vector) for vector in all_at_once] == [384] * 20
    assert all_at_once[3] == pytest.approx(embedding.get_text_embedding("text 3"), abs=1e-6)
    assert all_at_once[3] == pytest.approx(await embedding.aget_text_embedding("text 3"), abs=1e-6)
    assert all_at_once[4] == pytest.approx((await embedding.aget_text_embedding_batch(texts))[4], abs=1e-6)
    assert all_at_once[5] == pytest.approx(embedding.get_query_embedding("text 5"), abs=1e-6)
    assert all_at_once[5] == pytest.approx(await embedding.aget_query_embedding("text 5"), abs=1e-6)


async def test_concurrent_queries_share_batches(embedding: OctavoEmbedding) -> None:
    before = embedding._shared.llm.stats().steps
    await asyncio.gather(*(embedding.aget_query_embedding(f"query {n}") for n in range(30)))
    assert embedding._shared.llm.stats().steps - before < 20


def test_serialisation_and_sharing(embedding: OctavoEmbedding) -> None:
    secret = OctavoEmbedding(token="hf_secret")
    assert not secret._shared.started
    kept = secret.to_dict()
    assert "hf_secret" not in str(kept) + repr(secret)
    assert kept["class_name"] == "OctavoEmbedding"
    again = OctavoEmbedding.from_dict(kept)
    assert again.get_query_embedding("a") == embedding.get_query_embedding("a")
    assert again._shared.llm is embedding._shared.llm
    again.close()
    secret.close()
    assert embedding._shared.config in registry.running()


def test_a_copy_is_a_user_of_its_own(embedding: OctavoEmbedding) -> None:
    copied = copy.deepcopy(embedding)
    assert copied.to_dict() == embedding.to_dict()
    copied.close()
    assert len(embedding.get_query_embedding("a")) == 384


def test_an_index_finds_what_is_meant(embedding: OctavoEmbedding) -> None:
    documents = [Document(text=text) for text in ("Cats purr.", "A bicycle has two wheels.", "The Nile is a river.")]
    index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("Which vehicle has wheels?")
    assert "bicycle" in found.text


def test_bad_settings_and_texts(embedding: OctavoEmbedding) -> None:
    with pytest.raises(ConfigError, match="dtyp"):
        OctavoEmbedding(engine_kwargs={"dtyp": "float32"})
    with pytest.raises(RequestError, match="text 0"):
        embedding._get_text_embeddings([3])  # type: ignore[list-item]
