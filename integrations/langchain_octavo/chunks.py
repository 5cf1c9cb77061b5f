"""From a request's pieces to LangChain's chunks, one for each piece, and from a whole output to a message.

One `Answer` follows one output of a request. What a piece says beyond plain text (reasoning, tool calls) comes from the
chat parser of its plan. The last chunk has usage, finish reason and timings.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from langchain_core.messages import AIMessage, AIMessageChunk, InvalidToolCall, ToolCall, ToolCallChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk
from octavo.chat import ChatParser, Delta, ReasoningDelta, TextDelta, ToolCallDelta
from octavo.outputs import CompletionOutput, RequestMetrics, StreamPiece
from octavo.tokenizer import Tokenizer
from pydantic import BaseModel

from langchain_octavo.results import answer_info, logprobs, usage

Model = TypeVar("Model", bound=BaseModel)


class Answer:
    """One output as it comes. `model`: its name for the metadata. `metrics`: of its request, which fills them."""

    def __init__(self, parser: ChatParser, tokenizer: Tokenizer, model: str, metrics: RequestMetrics) -> None:
        self.parser, self.tokenizer, self.model, self.metrics = parser, tokenizer, model, metrics
        self.ended = False

    def deltas(self, piece: StreamPiece) -> list[Delta]:
        """What `piece` adds."""
        found = self.parser.push(piece.text) if piece.text else []
        if piece.finish_reason is not None:
            self.ended = True
            found += self.parser.finish()
        return found

    def info(self, piece: StreamPiece) -> dict[str, Any] | None:
        """`generation_info` of the chunk of `piece`."""
        found: dict[str, Any] = {}
        if piece.logprobs is not None:
            found["logprobs"] = logprobs(self.tokenizer, piece.token_ids, piece.logprobs)
        if self.ended:
            reason = self.finish_reason(piece.finish_reason)
            found |= answer_info(self.model, reason, piece.stop_reason, self.metrics)
        return found or None

    def finish_reason(self, reason: str | None) -> str | None:
        """As OpenAI has it: an answer that calls tools says so."""
        return "tool_calls" if reason == "stop" and self.parser.message.tool_calls else reason

    def chunk(self, piece: StreamPiece, deltas: list[Delta]) -> ChatGenerationChunk:
        """The chunk for `piece`, with string content."""
        if len(deltas) == 1 and type(deltas[0]) is TextDelta and piece.logprobs is None and not self.ended:
            return text_chunk(deltas[0].text)  # nearly all chunks are this one
        text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
        return self._with(piece, deltas, text)

    def block_chunk(self, piece: StreamPiece, deltas: list[Delta], blocks: Blocks) -> ChatGenerationChunk:
        """The chunk for `piece`, with standard content blocks."""
        content: list[str | dict[Any, Any]] = [blocks.block(delta) for delta in deltas]
        chunk = self._with(piece, deltas, content)
        chunk.message.response_metadata = {"output_version": "v1"}
        return chunk

    def _with(
        self, piece: StreamPiece, deltas: list[Delta], content: str | list[str | dict[Any, Any]]
    ) -> ChatGenerationChunk:
        fields: dict[str, Any] = {}
        calls = [tool_call_chunk(delta) for delta in deltas if isinstance(delta, ToolCallDelta)]
        if calls:
            fields["tool_call_chunks"] = calls
        if isinstance(content, str):
            thoughts = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
            if thoughts:
                fields["additional_kwargs"] = {"reasoning_content": thoughts}
        if self.ended:
            fields["chunk_position"] = "last"
            fields["usage_metadata"] = usage(self.metrics)
        message = AIMessageChunk(content=content, **fields)
        return ChatGenerationChunk(message=message, generation_info=self.info(piece))


_PLAIN = ChatGenerationChunk(message=AIMessageChunk(content=""))


def text_chunk(text: str) -> ChatGenerationChunk:
    """A chunk of plain text, made after one that was checked: checking each costs more than all else that is done for a
    token (`benchmarks/doors.py`), most of it for tool calls, of which it has none."""
    message = _made_after(
        _PLAIN.message, content=text, additional_kwargs={}, response_metadata={}, tool_calls=[], invalid_tool_calls=[],
        tool_call_chunks=[],
    )  # fmt: skip
    return _made_after(_PLAIN, text=text, message=message)


def _made_after(model: Model, **changes: Any) -> Model:
    """What pydantic's `model_copy` does, without the ways that these models do not need."""
    made = type(model).__new__(type(model))
    set_ = object.__setattr__
    set_(made, "__dict__", {**model.__dict__, **changes})
    set_(made, "__pydantic_fields_set__", set(model.__pydantic_fields_set__))
    set_(made, "__pydantic_extra__", None)
    set_(made, "__pydantic_private__", None)
    return made


class Blocks:
    """Numbers the content blocks of a message: text and reasoning go on until another kind comes, each tool call is a
    block."""

    def __init__(self) -> None:
        self.count = 0
        self.current: Any = None
        self._calls: dict[int, int] = {}

    def place(self, delta: Delta) -> tuple[int, bool]:
        """The number of the block that `delta` belongs to, and whether it is its first."""
        if isinstance(delta, ToolCallDelta):
            self.current = None
            first = delta.index not in self._calls
            if first:
                self._calls[delta.index] = self.count
                self.count += 1
            return self._calls[delta.index], first
        first = self.current is not type(delta)
        if first:
            self.current = type(delta)
            self.count += 1
        return self.count - 1, first

    def block(self, delta: Delta) -> dict[str, Any]:
        """`delta` as a standard content block with its number."""
        place, _ = self.place(delta)
        if isinstance(delta, TextDelta):
            return {"type": "text", "text": delta.text, "index": place}
        if isinstance(delta, ReasoningDelta):
            return {"type": "reasoning", "reasoning": delta.text, "index": place}
        return {**tool_call_chunk(delta), "index": place}


def tool_call_chunk(delta: ToolCallDelta) -> ToolCallChunk:
    return ToolCallChunk(type="tool_call_chunk", id=delta.id, name=delta.name, args=delta.arguments, index=delta.index)


def generation(answer: Answer, output: CompletionOutput) -> ChatGeneration:
    """A whole output as a message."""
    answer.parser.push(output.text)
    answer.parser.finish()
    parsed = answer.parser.message
    calls = [call_block(call.id, call.name, call.arguments) for call in parsed.tool_calls]
    info = answer_info(answer.model, answer.finish_reason(output.finish_reason), output.stop_reason, answer.metrics)
    if output.logprobs is not None:
        info["logprobs"] = logprobs(answer.tokenizer, output.token_ids, output.logprobs)
    message = AIMessage(
        content=parsed.content,
        tool_calls=[call for call in calls if call["type"] == "tool_call"],
        invalid_tool_calls=[call for call in calls if call["type"] == "invalid_tool_call"],
        usage_metadata=usage(answer.metrics),
        additional_kwargs={"reasoning_content": parsed.reasoning} if parsed.reasoning else {},
    )
    return ChatGeneration(message=message, generation_info=info)


def call_block(call_id: str | None, name: str | None, arguments: str) -> ToolCall | InvalidToolCall:
    """A complete tool call. It is an invalid one if its arguments are no JSON object: an answer can end within them."""
    try:
        found = json.loads(arguments or "{}")
        error = None if isinstance(found, dict) else "the arguments are not an object"
    except ValueError as problem:
        error = f"the arguments are not JSON: {problem}"
    if error is not None:
        return InvalidToolCall(type="invalid_tool_call", id=call_id, name=name, args=arguments, error=error)
    return ToolCall(type="tool_call", id=call_id, name=name or "", args=found)
