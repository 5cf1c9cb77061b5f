"""`OctavoEmbedding`: embedding models for LlamaIndex, on the engines of Octavo."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr, SecretStr

from octavo.models.sources import EMBEDDING_MODEL
from octavo.shared import SharedEngine


class OctavoEmbedding(BaseEmbedding):
    """Embeddings of a BERT-family sentence-transformers model, pooled and normalised as its configuration says.

    Constructing one loads nothing; objects of the same `model_name` and `engine_kwargs` share one engine, and texts of
    all callers share batches. Raises `ConfigError` for unknown settings and `RequestError` for what is no text.
    """

    model_name: str = Field(default=EMBEDDING_MODEL, description="A folder, a model id, or pypi:package==version.")
    token: SecretStr | None = Field(default=None, exclude=True, repr=False, description="Access token of the hub.")
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Fields of EngineConfig.")
    query_prompt_name: str | None = Field(default=None, description="The model's prompt in front of a query.")
    text_prompt_name: str | None = Field(default=None, description="The model's prompt in front of a text.")

    _shared: SharedEngine = PrivateAttr()

    def __init__(self, model_name: str = EMBEDDING_MODEL, **kwargs: Any) -> None:
        kwargs.setdefault("embed_batch_size", 512)  # the engine cuts batches by tokens itself
        super().__init__(model_name=model_name, **kwargs)
        token = {} if self.token is None else {"token": self.token.get_secret_value()}
        self._shared = SharedEngine(self.model_name, **self.engine_kwargs, **token)

    @classmethod
    def class_name(cls) -> str:
        return "OctavoEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._shared.llm.embed(query, prompt_name=self.query_prompt_name)[0].embedding

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return [output.embedding for output in self._shared.llm.embed(texts, prompt_name=self.text_prompt_name)]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        engine = await self._shared.start()
        return (await engine.embed(query, prompt_name=self.query_prompt_name))[0].embedding

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        engine = await self._shared.start()
        return [output.embedding for output in await engine.embed(texts, prompt_name=self.text_prompt_name)]

    def __copy__(self) -> Self:
        """A user of the engine in its own right: closing one does not close the other."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set})

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.__copy__()

    def close(self) -> None:
        """Let go of the engine; the last object's `close` gives back its memory. Safe to call twice."""
        self._shared.close()
