"""`/v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from octavo.server.protocol.base import Body, Id, Ids, Short

MAX_INPUTS = 2048
MAX_CHARACTERS = 1 << 20
Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


class EmbeddingRequest(Body):
    """OpenAI's fields; `prompt_name` is one of the model's own prompts."""

    input: Text | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    model: Short | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    prompt_name: Short | None = None
    user: Short | None = None
    request_id: Id | None = None
