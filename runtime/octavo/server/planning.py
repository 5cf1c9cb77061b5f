"""A chat planned: its prompt, the grammar of its answer, its parser. Called by `chat`, `responses` and `tokens`.

What of it is a client's code is not run here but by the guard (`processes/guard.py`): a template that comes with the
request, its schemas, the grammar that is made of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.chat import ChatPlan, ChatSketch, sketch_chat
from octavo.chat import response_format as as_plan
from octavo.chat.tools import Reason
from octavo.errors import QueueFullError, RequestError
from octavo.processes.guard import Guard
from octavo.sampling_params import SamplingParams
from octavo.server.errors import refused
from octavo.server.models import Loaded
from octavo.server.prompts import off_loop, truncated
from octavo.structured_outputs import StructuredOutputsParams

_ALWAYS_APART = 1 << 30
"""What makes a grammar goes to a thread, however short."""
BLAME_SECONDS = 1.0
"""To find which schema is to blame for a grammar that was refused."""
_WHY = {
    "slow": "takes too long: make it smaller",
    "large": "takes too much memory: make it smaller",
}


async def planned(
    loaded: Loaded, messages: Sequence[Mapping[str, Any]], size: int, params: SamplingParams, *,
    tools: Sequence[Mapping[str, Any]] | None, choice: str = "auto", parallel: bool | None = None,
    response_format: Mapping[str, Any] | None = None, variables: Mapping[str, Any], template: str | None = None,
    keep: int | None = None, special: bool = False,
) -> ChatPlan:  # fmt: skip
    """A plan for `messages` of `size` characters.

    Args:
        response_format: OpenAI's.
        template: one that came with the request.
        keep: tokens of the prompt's end that are kept, of all.
        special: add special tokens as for a plain text; a template has written its own.

    Raises:
        RequestError, ApiError: with the field "messages", "tools", "tool_choice", "response_format", ...
        QueueFullError: too many wait for the guard.
    """
    tokenizer = loaded.llm.tokenizer
    loaded.bound.check_size(size, "messages")
    loaded.bound.check_size(len(str(tools or "")), "tools")
    shape = as_plan(response_format)
    met: list[str] = []

    def sketch(reason: Reason) -> ChatSketch:
        return sketch_chat(
            tokenizer, messages, params, tools=tools, tool_choice=choice, parallel_tool_calls=parallel,
            chat_template=template, chat_template_kwargs=variables, reason=reason, **shape,
        )  # fmt: skip

    def meet(schema: str) -> str:
        met.append(schema)
        return ""

    def plan(sketched: ChatSketch, text: str) -> ChatPlan:
        found = sketched.plan(text)
        ids = tokenizer.encode(text) if special else found.prompt["prompt_token_ids"]
        found.prompt["prompt_token_ids"] = truncated(ids, keep, loaded.llm)
        return found

    def whole() -> ChatPlan:
        sketched = sketch(meet)
        return plan(sketched, sketched.render())

    try:
        if template is None:
            found = await off_loop(_ALWAYS_APART if tools or shape else size, whole)
        else:
            sketched = await asyncio.to_thread(sketch, meet)
            text = await _rendered(loaded.guard, sketched, loaded.bound.bytes)
            found = await asyncio.to_thread(plan, sketched, text)
        form = found.params.structured_outputs
        made = None if form is params.structured_outputs else form  # the caller's own is looked at by `respond`
        await _approve(loaded, made, met, sketch, "tools" if tools else "response_format")
        return found
    except RequestError as error:
        if error.field in ("json_schema", "json_object"):
            raise refused(str(error), "response_format") from error
        raise


async def _approve(
    loaded: Loaded, form: StructuredOutputsParams | None, schemas: Sequence[str],
    sketch: Callable[[Reason], ChatSketch], field: str,
) -> None:  # fmt: skip
    """Raises `RequestError` with this field if there can be no such grammar, or with what is said of one of the
    schemas, if one has a fault of its own."""
    try:
        if form is not None:
            return await loaded.verdicts.approve(form)
    except RequestError as error:
        await _blame(loaded, schemas, sketch)
        raise RequestError(str(error), field) from error
    await _blame(loaded, schemas, sketch)


async def _blame(loaded: Loaded, schemas: Sequence[str], sketch: Callable[[Reason], ChatSketch]) -> None:
    """Raises `RequestError` for the first schema that has a fault of its own, if it is found soon."""
    reasons = dict.fromkeys(schemas, "")
    try:
        async with asyncio.timeout(BLAME_SECONDS):
            for schema in reasons:
                reasons[schema] = await loaded.verdicts.reason(schema)
                if reasons[schema]:
                    break
    except TimeoutError:
        return
    if any(reasons.values()):
        await asyncio.to_thread(sketch, reasons.__getitem__)


async def _rendered(guard: Guard, sketch: ChatSketch, longest: int) -> str:
    """By the guard: a text of `longest` bytes at most."""
    for place, messages in enumerate(sketch.chats):
        body = json.dumps({**sketch.arguments(messages), "longest": longest})
        answer = await asyncio.wrap_future(guard.ask("template", body))
        if answer.outcome == "fine":
            return answer.text
        if answer.outcome in ("busy", "late"):
            raise QueueFullError("too many templates wait already")
        if answer.outcome != "refused":
            reason = _WHY.get(answer.outcome, "is more than can be rendered: make it simpler")
            raise RequestError(f"the chat template {reason}", "chat_template")
        if answer.field != "messages" or place + 1 == len(sketch.chats):
            raise RequestError(answer.text, answer.field)
    raise AssertionError("a sketch has a chat")


def with_effort(variables: dict[str, Any], effort: str | None, source: str, field: str) -> dict[str, Any]:
    """Variables of a template with a level of reasoning, for those that have levels. Raises `ApiError`."""
    if effort is None:
        return variables
    if "reasoning_effort" not in source:
        raise refused(f"this model has no levels of reasoning: leave {field} out", field)
    return {**variables, "reasoning_effort": effort}
