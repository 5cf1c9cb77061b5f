"""Chat messages there and back: `to_dicts` for the model's template, `to_blocks` of what the model said.

Called by `llm.py` and `answer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from octavo.errors import RequestError

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_dicts(messages: Any) -> list[dict[str, Any]]:
    """A list of `ChatMessage`s in OpenAI's form. Raises `RequestError` (field "messages") that names a message which is
    no text."""
    if isinstance(messages, str | ChatMessage) or not isinstance(messages, Sequence):
        raise RequestError("messages must be a list of ChatMessage", "messages")
    if not messages:
        raise RequestError("messages is empty: give at least one", "messages")
    return [_to_dict(message, place) for place, message in enumerate(messages)]


def _to_dict(message: ChatMessage, place: int) -> dict[str, Any]:
    if not isinstance(message, ChatMessage):
        raise RequestError(f"messages[{place}] is a {type(message).__name__}, not a ChatMessage", "messages")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.blocks:
        if isinstance(block, ThinkingBlock):
            thoughts.append(block.content or "")
        elif isinstance(block, ToolCallBlock):
            calls.append(_call(block.tool_call_id, block.tool_name, block.tool_kwargs))
        elif not isinstance(block, CachePoint):
            texts.append(_text(block, place))
    more = message.additional_kwargs
    if not calls:  # histories that were written before there were blocks for it
        calls = [_plain_call(call, place) for call in more.get("tool_calls") or ()]
    made: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role.value), "content": "\n".join(texts),
        "reasoning_content": "\n".join(thoughts), "tool_calls": calls,
        "tool_call_id": more.get("tool_call_id"), "name": more.get("name"),
    }  # fmt: skip
    return {name: value for name, value in made.items() if value or name == "content"}


def _text(block: ContentBlock, place: int) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, CitableBlock):
        return "\n".join(_text(part, place) for part in block.content)
    if isinstance(block, CitationBlock):
        return _text(block.cited_content, place)
    raise RequestError(f"messages[{place}] has a {block.block_type!r} block; only text is supported", "messages")


def _call(call_id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if call_id is None else {"id": call_id, **made}


def _plain_call(call: Any, place: int) -> dict[str, Any]:
    """A call as a dict, from a dict or an object of OpenAI's form."""
    if not isinstance(call, Mapping) and hasattr(call, "model_dump"):
        call = call.model_dump()
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"messages[{place}] has a tool call without a function's name", "messages")
    return _call(call.get("id"), function["name"], function.get("arguments") or {})


def to_message(text: str, reasoning: str, calls: Sequence[Sequence[str]], *, finished: bool = True) -> ChatMessage:
    """What the model said, as blocks: thinking, text, tool calls. calls: id, name, JSON text of the arguments.

    While a call is not finished its `tool_kwargs` is the text so far. The calls are in `additional_kwargs` too, because
    parts of LlamaIndex still look for them there.
    """
    blocks: list[ContentBlock] = [ThinkingBlock(content=reasoning)] if reasoning else []
    if text or not calls:
        blocks.append(TextBlock(text=text))
    if not calls:
        return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks)
    for call_id, name, arguments in calls:
        kwargs = parsed_arguments(arguments) if finished else None
        blocks.append(
            ToolCallBlock(tool_call_id=call_id, tool_name=name, tool_kwargs=arguments if kwargs is None else kwargs)
        )
    more = {"tool_calls": [_call(call_id, name, arguments) for call_id, name, arguments in calls]}
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=more)


def parsed_arguments(text: str) -> dict[str, Any] | None:
    """The arguments of a call, or None if the text is not (yet) a JSON object."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
