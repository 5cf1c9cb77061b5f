"""Sampling parameters as a client may give them: OpenAI's, and vLLM's under vLLM's names. None is "not given".

Ranges are those of `SamplingParams`, which checks them; here stand types, and bounds on how many there may be of
anything, so that nothing is worked through before it is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from octavo.server.protocol.base import Body, Id, Number, Short, TokenId

StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(max_length=10_000, fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(Body):
    """Fields of requests that make text."""

    temperature: Number | None = None
    top_p: Number | None = None
    n: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=64, fail_fast=True)] | None = None
    seed: int | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=1024)] | None = None
    max_tokens: int | None = None

    # vLLM's
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    bad_words: Annotated[list[StopString], Field(max_length=1024, fail_fast=True)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=1 << 18, fail_fast=True)] | None = None
    prompt_logprobs: int | None = None
    use_beam_search: bool | None = None
    length_penalty: Number | None = None
    early_stopping: bool | Literal["never"] | None = None
    beam_width: int | None = None
    no_repeat_ngram_size: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=10_000, fail_fast=True)] | None = None
    guided_grammar: str | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: Id | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    # labels of the client's, which change no answer
    user: Short | None = None
