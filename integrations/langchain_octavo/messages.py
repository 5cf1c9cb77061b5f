"""LangChain's messages as those of a chat template: dicts with role and content, as OpenAI has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from octavo.errors import RequestError

# In messages of an assistant these stand beside `tool_calls`, or are made by servers that are not here.
_NO_TEXT = frozenset(
    {
        "tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "function_call", "server_tool_call",
        "server_tool_call_chunk", "server_tool_result",
    }
)  # fmt: skip
_REASONING = {"reasoning": "reasoning", "thinking": "thinking"}


def to_openai(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Raises `RequestError` (field "messages") for none at all, for a content block that is no text (images, audio,
    files), and for a message that a conversation cannot hold."""
    if not messages:
        raise RequestError("messages is empty: a conversation needs at least one message", "messages")
    return [_message(message, place) for place, message in enumerate(messages)]


def _message(message: BaseMessage, place: int) -> dict[str, Any]:
    text, reasoning = _content(message, place)
    found: dict[str, Any] = {"role": _role(message, place), "content": text}
    if message.name is not None:
        found["name"] = message.name
    if isinstance(message, AIMessage):
        reasoning = reasoning or message.additional_kwargs.get("reasoning_content") or ""
        if reasoning:
            found["reasoning_content"] = reasoning
        calls = [_call(call["id"], call["name"], call["args"]) for call in message.tool_calls]
        calls += [_call(call["id"], call["name"] or "", call["args"] or "") for call in message.invalid_tool_calls]
        if calls:
            found["tool_calls"] = calls
    elif isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    return found


def _role(message: BaseMessage, place: int) -> str:
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    if isinstance(message, ChatMessage):
        return message.role
    raise RequestError(f"messages[{place}] is a {type(message).__name__}, which no conversation holds", "messages")


_ROLES = (
    (SystemMessage, "system"), (HumanMessage, "user"), (AIMessage, "assistant"), (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)  # fmt: skip


def _call(call_id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call_id or "", "type": "function", "function": {"name": name, "arguments": text}}


def _content(message: BaseMessage, place: int) -> tuple[str, str]:
    """Text and reasoning of a message's content blocks, of any version."""
    content = message.content
    if isinstance(content, str):
        return content, ""
    texts: list[str] = []
    thoughts: list[str] = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
            continue
        kind = block.get("type")
        if kind in _REASONING:
            thoughts.append(str(block.get(_REASONING[kind]) or ""))
        elif isinstance(block.get("text"), str) and kind in ("text", "text-plain", "input_text", "output_text", None):
            texts.append(block["text"])
        elif kind == "json" or (kind is None and "json" in block):
            texts.append(json.dumps(block.get("json"), ensure_ascii=False))
        elif kind not in _NO_TEXT:
            raise RequestError(
                f"messages[{place}] has a content block of type {kind!r}: this model reads text only", "messages"
            )
    return "".join(texts), "".join(thoughts)
