"""`/tokenize` and `/detokenize`, which are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from octavo.server.protocol.base import Body, Short, TokenId
from octavo.server.protocol.chat import MAX_MESSAGES, Message, Tool


class TokenizeRequest(Body):
    """A text, or the messages of a chat."""

    model: Short | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None


class DetokenizeRequest(Body):
    model: Short | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20, fail_fast=True)]
