"""`ToolCalls`: from LlamaIndex's tools to the arguments of a chat call, and from its response to the calls to make.

`chat_with_tools`, `predict_and_call` and their twins are LlamaIndex's own, over these three methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.utils import parse_partial_json
from llama_index.core.tools.types import BaseTool
from llama_index.llms.octavo.fields import OctavoFields
from llama_index.llms.octavo.schemas import openai_tool


class ToolCalls(OctavoFields):
    """Calling tools."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of `chat`. `tool_choice` ("auto", "required", "none", a name) goes before `tool_required`."""
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(
                ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
            )
        arguments: dict[str, Any] = {"messages": messages, **kwargs}
        if tools:
            arguments["tools"] = [openai_tool(tool) for tool in tools]
            arguments["tool_choice"] = tool_choice or ("required" if tool_required else "auto")
            arguments["parallel_tool_calls"] = allow_parallel_tool_calls
        return arguments

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls in `response`; of one that is not finished, with the arguments as far as they have come.

        Raises `ValueError` when there is none and `error_on_no_tool_call`.
        """
        blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not blocks and error_on_no_tool_call:
            raise ValueError(
                f"the model called no tool, it said {response.message.content!r}: tool_required=True makes it call one"
            )
        return [
            ToolSelection(
                tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=_arguments(block.tool_kwargs)
            )
            for block in blocks
        ]


def _arguments(given: dict[str, Any] | str) -> dict[str, Any]:
    if not isinstance(given, str):
        return given
    try:
        value = parse_partial_json(given)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
