"""A chat planned: its prompt, the grammar of its answer, its parser. Called by `chat` and `responses`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.chat import ChatPlan, plan_chat
from octavo.chat import response_format as as_plan
from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams
from octavo.server.errors import refused
from octavo.server.models import Loaded
from octavo.server.prompts import off_loop, truncated

_ALWAYS_APART = 1 << 30
"""What compiles something goes to a thread, however short."""


async def planned(
    loaded: Loaded, messages: Sequence[Mapping[str, Any]], size: int, params: SamplingParams, *,
    tools: Sequence[Mapping[str, Any]] | None, choice: str, parallel: bool | None, form: Mapping[str, Any] | None,
    variables: Mapping[str, Any], template: str | None = None, keep: int | None = None, special: bool = False,
) -> ChatPlan:  # fmt: skip
    """A plan for `messages` of `size` characters.

    Args:
        form: OpenAI's `response_format`.
        keep: tokens of the prompt's end that are kept, of all.
        special: add special tokens as for a plain text; a template has written its own.

    Raises:
        RequestError, ApiError: with the field "messages", "tools", "tool_choice", "response_format", ...
    """
    tokenizer = loaded.llm.tokenizer
    loaded.bound.check_size(size, "messages")
    loaded.bound.check_size(len(str(tools or "")), "tools")
    shape = as_plan(form)

    def plan() -> ChatPlan:
        found = plan_chat(
            tokenizer, messages, params, tools=tools, tool_choice=choice, parallel_tool_calls=parallel,
            chat_template=template, chat_template_kwargs=variables, **shape,
        )  # fmt: skip
        ids = tokenizer.encode(found.prompt["prompt"]) if special else found.prompt["prompt_token_ids"]
        found.prompt["prompt_token_ids"] = truncated(ids, keep, loaded.llm)
        return found

    try:
        return await off_loop(_ALWAYS_APART if tools or shape or template else size, plan)
    except RequestError as error:
        if error.field in ("json_schema", "json_object"):
            raise refused(str(error), "response_format") from error
        raise


def with_effort(variables: dict[str, Any], effort: str | None, source: str, field: str) -> dict[str, Any]:
    """Variables of a template with a level of reasoning, for those that have levels. Raises `ApiError`."""
    if effort is None:
        return variables
    if "reasoning_effort" not in source:
        raise refused(f"this model has no levels of reasoning: leave {field} out", field)
    return {**variables, "reasoning_effort": effort}
