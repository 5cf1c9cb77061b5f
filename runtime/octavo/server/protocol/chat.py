"""`/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from octavo.server.protocol.base import Body, Neutral, Short, StreamOptions
from octavo.server.protocol.sampling import Sampling

MAX_MESSAGES = 4096


class TextPart(Body):
    neutral: ClassVar[Neutral] = {"prompt_cache_breakpoint": ()}

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str | dict[str, Any]


class CallMade(Body):
    """A tool call of an earlier answer."""

    id: Short | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    """One message. Other parts than text are refused."""

    neutral: ClassVar[Neutral] = {"refusal": (), "audio": (), "function_call": (), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    name: Short | None = None
    tool_calls: Annotated[list[CallMade], Field(max_length=1024, fail_fast=True)] | None = None
    tool_call_id: Short | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: Short | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatCompletionRequest(Sampling):
    """OpenAI's fields, and vLLM's under vLLM's names."""

    neutral: ClassVar[Neutral] = {
        "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"), "modalities": (["text"],),
        "verbosity": ("medium",), "audio": (), "moderation": (), "prediction": (), "web_search_options": (),
        "echo": (False,), "function_call": ("none",), "functions": (),
        "prompt_cache_retention": (), "prompt_cache_options": (),
    }  # fmt: skip

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    model: Short | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    best_of: int | None = None

    # vLLM's
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None

    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None
