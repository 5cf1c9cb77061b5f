"""`/v1/completions`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from octavo.server.protocol.base import Ids, Neutral, Short, StreamOptions
from octavo.server.protocol.chat import ResponseFormat
from octavo.server.protocol.sampling import Sampling

MAX_PROMPTS = 1024
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Prompts = str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(Sampling):
    """OpenAI's fields, and vLLM's under vLLM's names."""

    neutral: ClassVar[Neutral] = {"suffix": ("",)}

    prompt: Prompts
    model: Short | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
