"""`/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from octavo.server.protocol.base import Body, Neutral, Short
from octavo.server.protocol.chat import MAX_MESSAGES
from octavo.server.protocol.sampling import Sampling

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Body):
    """A part of a message. Other kinds than text are refused."""

    neutral: ClassVar[Neutral] = {"prompt_cache_breakpoint": ()}

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Content = str | Annotated[list[Part], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class MessageItem(Body):
    neutral: ClassVar[Neutral] = {"phase": ("commentary", "final_answer")}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Short | None = None
    status: Status | None = None


class CallItem(Body):
    """A call that an earlier answer made."""

    neutral: ClassVar[Neutral] = {"caller": (), "namespace": ()}

    type: Literal["function_call"]
    call_id: Short
    name: Short
    arguments: str
    id: Short | None = None
    status: Status | None = None


class ResultItem(Body):
    """What it gave."""

    neutral: ClassVar[Neutral] = {"caller": (), "namespace": ()}

    type: Literal["function_call_output"]
    call_id: Short
    output: Content
    id: Short | None = None
    name: Short | None = None
    status: Status | None = None


class Thought(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Body):
    """What an earlier answer thought."""

    neutral: ClassVar[Neutral] = {"encrypted_content": ()}

    type: Literal["reasoning"]
    id: Short | None = None
    summary: Annotated[list[Thought], Field(max_length=1024, fail_fast=True)] | None = None
    content: Annotated[list[Thought], Field(max_length=1024, fail_fast=True)] | None = None
    status: Status | None = None


def _kind(item: Any) -> str:
    found = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return found if isinstance(found, str) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Body):
    neutral: ClassVar[Neutral] = {"output_schema": (), "defer_loading": (False,), "allowed_callers": ()}

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Short | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextSettings(Body):
    neutral: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ReasoningSettings(Body):
    neutral: ClassVar[Neutral] = {"summary": (), "generate_summary": (), "mode": (), "context": ("auto",)}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponseStreamOptions(Body):
    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,)}


class ResponsesRequest(Sampling):
    """OpenAI's fields, and vLLM's sampling parameters. Nothing is stored, so nothing stored can be named."""

    neutral: ClassVar[Neutral] = {
        "previous_response_id": (), "conversation": (), "prompt": (), "background": (False,), "store": (False,),
        "include": ([],), "max_tool_calls": (), "moderation": (), "truncation": ("disabled",), "top_logprobs": (0,),
        "service_tier": ("auto", "default"), "context_management": (), "prompt_cache_retention": (),
        "prompt_cache_options": (), "n": (1,), "max_tokens": (), "prompt_logprobs": (), "use_beam_search": (False,),
        "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "add_special_tokens": (False,),
    }  # fmt: skip

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    model: Short | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    metadata: Annotated[dict[Short, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None

    # vLLM's
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None
