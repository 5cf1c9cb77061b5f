"""`/v1/responses`: a chat in items, whole or as events. Nothing is stored."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.chat import ChatPlan
from octavo.outputs import RequestMetrics, RequestOutput
from octavo.server.call import Answer, Call, respond
from octavo.server.errors import api_error
from octavo.server.messages import template_variables
from octavo.server.models import Loaded
from octavo.server.planning import planned, with_effort
from octavo.server.prompts import salt_of, salted
from octavo.server.protocol.responses import (
    CallItem,
    Content,
    MessageItem,
    NamedTool,
    ReasoningItem,
    ResponsesRequest,
    ResultItem,
)
from octavo.server.response_items import Event, Items
from octavo.server.run import Run
from octavo.server.sampling import checked_room, form_name, sampling_params
from octavo.server.streams import Frames, named_frame


async def responses(request: Request) -> Response:
    """OpenAI's responses."""
    call = Call(request)
    body = await call.body(ResponsesRequest)

    async def prepare(loaded: Loaded) -> Answer:
        return await ResponseAnswer.prepare(call, body, loaded)

    return await respond(call, "responses", body.model, bool(body.stream), body.priority or 0, prepare)


class ResponseAnswer:
    """One call. Implements `Answer`."""

    special, size = False, 0

    def __init__(self, call: Call, body: ResponsesRequest, loaded: Loaded, plan: ChatPlan) -> None:
        self._call, self._body, self._plan = call, body, plan
        self._tokenizer = loaded.llm.tokenizer
        self.names = {"prompt": "input", "prompt_token_ids": "input", "structured_outputs": form_name(body)}
        self.params = plan.params
        self.prompts = [salted(plan.prompt, salt_of(call.salt, body.cache_salt))]
        self._parser, self._items = plan.parser(), Items()
        self._response = _response(body, f"resp_{call.id}", body.model or loaded.name)

    @classmethod
    async def prepare(cls, call: Call, body: ResponsesRequest, loaded: Loaded) -> ResponseAnswer:
        """Raises `RequestError` or `ApiError`."""
        most = body.max_output_tokens
        room = None if most is None else checked_room("max_output_tokens", most, loaded.llm)
        params = sampling_params(body, loaded.llm, max_tokens=room)
        messages = _messages(body)
        effort = None if body.reasoning is None else body.reasoning.effort
        source = loaded.llm.tokenizer.template_source(tools=bool(body.tools))
        choice = body.tool_choice or "auto"
        tools = None if body.tools is None else [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in body.tools
        ]  # fmt: skip
        plan = await planned(
            loaded, messages, sum(len(str(message)) for message in messages), params, tools=tools,
            choice=choice.name if isinstance(choice, NamedTool) else choice, parallel=body.parallel_tool_calls,
            response_format=_form(body), variables=with_effort(template_variables(body), effort, source, "reasoning"),
            keep=body.truncate_prompt_tokens,
        )  # fmt: skip
        return cls(call, body, loaded, plan)

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        output = outputs[0]
        self._items.take(self._parser.push(output.text))
        self._end(output.outputs[0].finish_reason, output.metrics)
        return self._response

    async def frames(self, run: Run) -> Frames:
        number = 0

        def frames(events: list[Event]) -> bytes:
            nonlocal number
            found = []
            for event in events:
                found.append(named_frame(event["type"], {**event, "sequence_number": number}))
                number += 1
            return b"".join(found)

        yield frames([{"type": f"response.{name}", "response": self._response} for name in ("created", "in_progress")])
        try:
            reason = None
            async for pieces in run.pieces():
                events: list[Event] = []
                for _, piece in pieces:
                    events += self._items.take(self._parser.push(piece.text) if piece.text else ())
                    reason = piece.finish_reason or reason
                if events:
                    yield frames(events)
            run.outputs()
        except Exception as error:
            failed = api_error(error, self._call.id)
            self._response |= {"status": "failed", "error": {"code": "server_error", "message": failed.message}}
            yield frames([{"type": "response.failed", "response": self._response}])
            return
        events = self._end(reason, run.metrics[0])
        yield frames([*events, {"type": f"response.{self._response['status']}", "response": self._response}])

    def _end(self, reason: str | None, metrics: RequestMetrics) -> list[Event]:
        """All has come."""
        cut = reason == "length"
        status = "incomplete" if cut else "completed"
        events = self._items.take(self._parser.finish()) + self._items.close(status)
        thoughts = self._parser.message.reasoning or ""
        self._response |= {
            "status": status,
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items.all,
            "usage": {
                "input_tokens": metrics.prompt_tokens,
                "input_tokens_details": {"cached_tokens": metrics.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": metrics.output_tokens,
                "output_tokens_details": {
                    "reasoning_tokens": len(self._tokenizer.encode(thoughts, False)) if thoughts else 0
                },
                "total_tokens": metrics.prompt_tokens + metrics.output_tokens,
            },
        }
        return events


def _response(body: ResponsesRequest, call_id: str, model: str) -> dict[str, Any]:
    """As it is before anything has come: what was asked comes back in it."""
    given = body.model_dump(exclude_none=True, by_alias=True)
    form = (given.get("text") or {}).get("format") or {"type": "text"}
    return {
        "id": call_id, "object": "response", "created_at": int(time.time()), "status": "in_progress", "error": None,
        "incomplete_details": None, "instructions": body.instructions, "metadata": body.metadata or {}, "model": model,
        "output": [], "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p, "top_logprobs": 0, "background": False, "store": False,
        "max_output_tokens": body.max_output_tokens, "service_tier": "default", "truncation": "disabled",
        "tool_choice": given.get("tool_choice", "auto"), "tools": given.get("tools", []), "text": {"format": form},
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "usage": None, "user": body.user,
    }  # fmt: skip


def _form(body: ResponsesRequest) -> dict[str, Any] | None:
    """`text.format` as `response_format`."""
    form = None if body.text is None else body.text.format
    if form is None:
        return None
    return {"type": form.type, "json_schema": {"schema": form.schema_}}


# -- items to messages -----------------------------------------------------------------------------------------------


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Thoughts, text and calls that follow each other are one message of the assistant."""
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    for item in body.input:
        if isinstance(item, MessageItem) and item.role != "assistant":
            found.append({"role": item.role, "content": _text(item.content)})
        elif isinstance(item, ResultItem):
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        else:
            _add_to_assistant(found, item)
    return found


def _add_to_assistant(found: list[dict[str, Any]], item: MessageItem | CallItem | ReasoningItem | ResultItem) -> None:
    last = found[-1] if found and found[-1]["role"] == "assistant" else None
    if isinstance(item, ReasoningItem):
        text = "".join(part.text for part in item.content or item.summary or ())
        if text:
            found.append({"role": "assistant", "content": "", "reasoning_content": text})
    elif isinstance(item, CallItem):
        if last is None:
            found.append(last := {"role": "assistant", "content": ""})
        function = {"name": item.name, "arguments": item.arguments}
        last.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, MessageItem):
        if last is not None and not last["content"] and "tool_calls" not in last:
            last["content"] = _text(item.content)
        else:
            found.append({"role": "assistant", "content": _text(item.content)})


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
