"""The keyword arguments of a call, sorted: what is sampling, what the chat plan needs, what nobody knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_core.messages import BaseMessage
from octavo.chat import ChatPlan, plan_chat, response_format
from octavo.client import Client
from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams

from langchain_octavo.calls import checked_timeout
from langchain_octavo.engines import unknown
from langchain_octavo.messages import to_openai
from langchain_octavo.sampling import SAMPLING_NAMES
from langchain_octavo.tools import tool_choice_of, tools_as_openai

if TYPE_CHECKING:
    from langchain_octavo.chat_models import ChatOctavo

_PLANNED = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "chat_template", "chat_template_kwargs")
_OTHERS = ("model", "timeout", "stream")


@dataclass(frozen=True)
class Asked:
    """One call."""

    model: str
    stop: list[str] | None
    timeout: float | None
    sampling: dict[str, Any]
    tools: list[dict[str, Any]] | None
    planned: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `plan_chat`."""


def ask(chat: ChatOctavo, stop: list[str] | None, kwargs: Mapping[str, Any]) -> Asked:
    """Raises `ConfigError` for an argument that nothing takes, `RequestError` for one that cannot be."""
    for name in kwargs:
        if name not in SAMPLING_NAMES and name not in _PLANNED and name not in _OTHERS:
            raise unknown(name, [*SAMPLING_NAMES, *_PLANNED, *_OTHERS])
    timeout = checked_timeout(kwargs.get("timeout", chat.timeout))
    tools = tools_as_openai(kwargs["tools"], strict=False) if kwargs.get("tools") else None
    planned: dict[str, Any] = {
        "chat_template": kwargs.get("chat_template", chat.chat_template),
        "chat_template_kwargs": {**(chat.chat_template_kwargs or {}), **(kwargs.get("chat_template_kwargs") or {})},
        **response_format(kwargs.get("response_format")),
    }
    parallel = kwargs.get("parallel_tool_calls")
    if parallel not in (None, True, False):
        raise RequestError(f"parallel_tool_calls must be True or False, not {parallel!r}", "parallel_tool_calls")
    if tools is not None:
        choice = tool_choice_of(kwargs.get("tool_choice"), tools)
        planned["tool_choice"] = choice or "auto"
        planned["parallel_tool_calls"] = parallel
    sampling = {name: value for name, value in kwargs.items() if name in SAMPLING_NAMES}
    return Asked(kwargs.get("model") or chat.model, stop, timeout, sampling, tools, planned)


def plan(client: Client, messages: Sequence[BaseMessage], asked: Asked, params: SamplingParams) -> ChatPlan:
    """The prompt, the parameters with a grammar if one is needed, and the parser."""
    return plan_chat(client.tokenizer, to_openai(messages), params, tools=asked.tools, **asked.planned)
