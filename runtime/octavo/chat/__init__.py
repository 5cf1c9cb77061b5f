"""Chat with tools: from messages and tools to a prompt and a grammar, and from the text that comes back to content,
reasoning and tool calls. Called by the doors (LangChain, LlamaIndex, the server).

    plan = plan_chat(llm.tokenizer, messages, SamplingParams(max_tokens=200), tools=tools)
    parser = plan.parser()
    for piece in llm.generate(plan.prompt, plan.params, stream=True):
        deltas = parser.push(piece.text)
    deltas = parser.finish()
    parser.message.tool_calls

`plan` puts it together; `tools` and `response_format` check what the caller gave; `schemas` makes those of classes fit;
`history` shapes earlier messages for templates; `answer` says what may come, as a grammar (`lark`) and as stages that
read it; `formats/` knows how models write calls; `parser`, `stages`, `calls` and `scan` read the output.
"""

from __future__ import annotations

from octavo.chat.deltas import Delta, ParsedMessage, ReasoningDelta, TextDelta, ToolCall, ToolCallDelta
from octavo.chat.parser import ChatParser
from octavo.chat.plan import ChatPlan, ChatSketch, plan_chat, sketch_chat
from octavo.chat.response_format import response_format
from octavo.chat.schemas import closed

__all__ = [
    "ChatParser",
    "ChatPlan",
    "ChatSketch",
    "Delta",
    "ParsedMessage",
    "ReasoningDelta",
    "TextDelta",
    "ToolCall",
    "ToolCallDelta",
    "closed",
    "plan_chat",
    "response_format",
    "sketch_chat",
]
