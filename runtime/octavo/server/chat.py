"""`/v1/chat/completions`: from messages to a plan, and from outputs to messages or chunks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.chat import ChatParser, ChatPlan, Delta, ReasoningDelta, TextDelta, ToolCallDelta
from octavo.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamPiece
from octavo.server.call import Answer, Call, respond
from octavo.server.errors import refused
from octavo.server.messages import chat_messages, check_template, template_variables
from octavo.server.models import Loaded
from octavo.server.planning import planned, with_effort
from octavo.server.prompts import salt_of, salted
from octavo.server.protocol.chat import ChatCompletionRequest, NamedTool
from octavo.server.run import Run
from octavo.server.sampling import checked_room, form_name, sampling_params
from octavo.server.shapes import chat_logprobs, prompt_logprobs, usage
from octavo.server.streams import DONE, Frames, frame, json_text

MAX_TOP_LOGPROBS = 20


async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions."""
    call = Call(request)
    body = await call.body(ChatCompletionRequest)

    async def prepare(loaded: Loaded) -> Answer:
        return await ChatAnswer.prepare(call, body, loaded)

    return await respond(call, "chat.completions", body.model, bool(body.stream), body.priority or 0, prepare)


class ChatAnswer:
    """One call. Implements `Answer`."""

    special, size = False, 0

    def __init__(self, call: Call, body: ChatCompletionRequest, loaded: Loaded, plan: ChatPlan) -> None:
        self._body, self._plan, self._tokenizer = body, plan, loaded.llm.tokenizer
        self.names = {"prompt": "messages", "prompt_token_ids": "messages", "structured_outputs": form_name(body)}
        self.params = plan.params
        self.prompts = [salted(plan.prompt, salt_of(call.salt, body.cache_salt))]
        self._id, self._created, self._model = f"chatcmpl-{call.id}", int(time.time()), body.model or loaded.name

    @classmethod
    async def prepare(cls, call: Call, body: ChatCompletionRequest, loaded: Loaded) -> ChatAnswer:
        """Raises `RequestError` or `ApiError`."""
        check_template(call, body.chat_template)
        messages, size = chat_messages(body.messages)
        params = sampling_params(body, loaded.llm, max_tokens=_max_tokens(body, loaded), **_counted(body))
        source = loaded.llm.tokenizer.template_source(body.chat_template, tools=bool(body.tools))
        choice = body.tool_choice or "auto"
        plan = await planned(
            loaded, messages, size, params, choice=choice.function.name if isinstance(choice, NamedTool) else choice,
            tools=None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools],
            parallel=body.parallel_tool_calls,
            response_format=None if body.response_format is None else body.response_format.model_dump(by_alias=True),
            variables=with_effort(template_variables(body), body.reasoning_effort, source, "reasoning_effort"),
            template=body.chat_template, keep=body.truncate_prompt_tokens, special=bool(body.add_special_tokens),
        )  # fmt: skip
        return cls(call, body, loaded, plan)

    # ---------------------------------------------------------------- whole

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        output = outputs[0]
        found: dict[str, Any] = {
            "id": self._id, "object": "chat.completion", "created": self._created, "model": self._model,
            "choices": [self._choice(choice) for choice in output.outputs], "usage": usage([output.metrics]),
        }  # fmt: skip
        if output.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return found

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        parser = self._plan.parser()
        parser.push(output.text)
        parser.finish()
        parsed = parser.message
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None}
        if parsed.reasoning and self._body.include_reasoning is not False:
            message["reasoning_content"] = parsed.reasoning
        if parsed.tool_calls:
            message["content"] = parsed.content or None
            message["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                for one in parsed.tool_calls
            ]
        choice = {
            "index": output.index, "message": message, "logprobs": None,
            "finish_reason": _finish_reason(output.finish_reason, parser), "stop_reason": output.stop_reason,
        }  # fmt: skip
        if output.logprobs is not None:
            choice["logprobs"] = {"content": self._logprobs(output.token_ids, output.logprobs), "refusal": None}
        if self._body.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def _logprobs(self, tokens: Sequence[int], given: Sequence[Any]) -> list[dict[str, Any]]:
        body = self._body
        return chat_logprobs(
            self._tokenizer, tokens, given, body.top_logprobs or 0, bool(body.return_tokens_as_token_ids)
        )

    # ---------------------------------------------------------------- streamed

    async def frames(self, run: Run) -> Frames:
        chunks = _Chunks(self._id, self._created, self._model, self._body)
        parsers = [self._plan.parser() for _ in range(self.params.choices)]
        yield b"".join(chunks.first(index, run.prompt_ids[0]) for index in range(len(parsers)))
        async for pieces in run.pieces():
            yield b"".join(self._frame(chunks, parsers[piece.index], piece, run) for _, piece in pieces)
        outputs = run.outputs()
        if chunks.with_usage:
            yield chunks.last([output.metrics for output in outputs])
        yield DONE

    def _frame(self, chunks: _Chunks, parser: ChatParser, piece: StreamPiece, run: Run) -> bytes:
        deltas = parser.push(piece.text) if piece.text else []
        ended = piece.finish_reason is not None
        if ended:
            deltas += parser.finish()
        plain = not ended and piece.logprobs is None and not self._body.return_token_ids and not chunks.continuous
        if plain and not deltas:
            return b""
        if plain and len(deltas) == 1 and type(deltas[0]) is TextDelta:
            return chunks.text(piece.index, deltas[0].text)
        delta = _delta(deltas, self._body.include_reasoning is not False)
        choice: dict[str, Any] = {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
        if piece.logprobs is not None:
            delta.setdefault("content", "")
            choice["logprobs"] = {"content": self._logprobs(piece.token_ids, piece.logprobs), "refusal": None}
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        if ended:
            choice["finish_reason"] = _finish_reason(piece.finish_reason, parser)
            choice["stop_reason"] = piece.stop_reason
        return chunks.chunk(choice, run.metrics)


class _Chunks:
    """Chunks of one stream."""

    def __init__(self, call_id: str, created: int, model: str, body: ChatCompletionRequest) -> None:
        options = body.stream_options
        self.with_usage = bool(options and options.include_usage)
        self.continuous = bool(options and options.continuous_usage_stats)
        self._with_ids = bool(body.return_token_ids)
        self._base = {"id": call_id, "object": "chat.completion.chunk", "created": created, "model": model}
        # nearly all chunks are plain text: of these only the text is written anew
        base = frame(self._base)[: -len(b"}\n\n")].decode()
        tail = ',"usage":null' if self.with_usage else ""
        self._before = base + ',"choices":[{"index":'
        self._after = f'}},"logprobs":null,"finish_reason":null}}]{tail}}}\n\n'

    def first(self, index: int, prompt_ids: list[int]) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        more = {"prompt_token_ids": prompt_ids} if self._with_ids and index == 0 else {}
        return frame({**self._base, "choices": [choice], **({"usage": None} if self.with_usage else {}), **more})

    def text(self, index: int, text: str) -> bytes:
        return f'{self._before}{index},"delta":{{"content":{json_text(text)}{self._after}'.encode()

    def chunk(self, choice: dict[str, Any], metrics: Sequence[RequestMetrics]) -> bytes:
        found: dict[str, Any] = {**self._base, "choices": [choice]}
        if self.continuous:
            found["usage"] = usage(metrics)
        elif self.with_usage:
            found["usage"] = None
        return frame(found)

    def last(self, metrics: Sequence[RequestMetrics]) -> bytes:
        return frame({**self._base, "choices": [], "usage": usage(metrics)})


def _delta(deltas: Iterable[Delta], with_reasoning: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in deltas:
        if isinstance(one, TextDelta):
            found["content"] = found.get("content", "") + one.text
        elif isinstance(one, ReasoningDelta):
            if with_reasoning:
                found["reasoning_content"] = found.get("reasoning_content", "") + one.text
        else:
            found.setdefault("tool_calls", []).append(_call_delta(one))
    return found


def _call_delta(delta: ToolCallDelta) -> dict[str, Any]:
    if delta.id is None and delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def _finish_reason(reason: str | None, parser: ChatParser) -> str | None:
    return "tool_calls" if reason == "stop" and parser.message.tool_calls else reason


# -- what is asked ---------------------------------------------------------------------------------------------------


def _max_tokens(body: ChatCompletionRequest, loaded: Loaded) -> int | None:
    """By its newer name. None: as many as fit."""
    given = body.max_completion_tokens
    if body.max_tokens is not None and given not in (None, body.max_tokens):
        raise refused("max_completion_tokens and max_tokens differ: give one of them", "max_completion_tokens")
    return None if given is None else checked_room("max_completion_tokens", given, loaded.llm)


def _counted(body: ChatCompletionRequest) -> dict[str, Any]:
    """Parameters with other names."""
    if body.stream:
        for name in ("prompt_logprobs", "best_of"):
            if getattr(body, name) is not None:
                raise refused(f"{name} cannot be streamed: leave it out, or stream", name)
    elif body.stream_options is not None:
        raise refused("stream_options need stream=true", "stream_options")
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise refused("top_logprobs needs logprobs=true", "top_logprobs")
        if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
            raise refused(f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}", "top_logprobs")
    return {"logprobs": (body.top_logprobs or 0) if body.logprobs else None, "best_of": body.best_of}
