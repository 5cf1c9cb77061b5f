"""What a request says to the model's chat template: its messages, its variables, perhaps a template of its own. Called
by the endpoints that render chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from octavo.server.call import Call
from octavo.server.errors import refused
from octavo.server.protocol.chat import Message

_NOT_VARIABLES = ("messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "self")

TEMPLATE_CHARACTERS = 1 << 18
"""Of a template that comes in a request: ten times as many as the longest that models have."""


class Rendered(Protocol):
    """The fields of a request that a template reads."""

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any] | None: ...

    @property
    def add_generation_prompt(self) -> bool | None: ...

    @property
    def continue_final_message(self) -> bool | None: ...


def chat_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], int]:
    """As `plan_chat` takes them, and the characters in them."""
    found = [message.model_dump(exclude_none=True) for message in messages]
    return found, sum(len(text) for message in found for text in _texts(message))


def _texts(message: dict[str, Any]) -> list[str]:
    content = message.get("content") or ""
    found = [content] if isinstance(content, str) else [part["text"] for part in content]
    found += [message[name] for name in ("reasoning_content", "reasoning") if name in message]
    return found + [str(call["function"]["arguments"]) for call in message.get("tool_calls") or ()]


def check_template(call: Call, template: str | None) -> None:
    """Raises `ApiError` for a template where the operator allows none, or for one that is too long."""
    if template is not None and not call.server.settings.allow_request_templates:
        message = "this server takes no templates from requests (it can be started with --allow-request-templates)"
        raise refused(message, "chat_template")
    if template is not None and len(template) > TEMPLATE_CHARACTERS:
        raise refused(f"a template may have {TEMPLATE_CHARACTERS} characters at most", "chat_template")


def template_variables(body: Rendered) -> dict[str, Any]:
    """For the template, and how it is to end. Raises `ApiError`."""
    found = dict(body.chat_template_kwargs or {})
    for name in found:
        if name in _NOT_VARIABLES or not name.isidentifier() or name.startswith("_"):
            raise refused(f"chat_template_kwargs: {name[:80]!r} is no variable of a template", "chat_template_kwargs")
    if body.continue_final_message:
        found |= {"continue_final_message": True, "add_generation_prompt": bool(body.add_generation_prompt)}
    elif body.add_generation_prompt is not None:
        found["add_generation_prompt"] = body.add_generation_prompt
    return found
