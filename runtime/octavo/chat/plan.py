"""`plan_chat`: from messages and tools to what an engine is given, and how its output is read. Called by the doors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from octavo.chat.answer import Answer, Thoughts
from octavo.chat.formats import tool_format
from octavo.chat.history import tell_of_schema, without_system
from octavo.chat.lark import special_token
from octavo.chat.parser import ChatParser
from octavo.chat.stages import Stage
from octavo.chat.tools import Reason, check_choice, check_tools, schema_reason, unsupported
from octavo.chat_template import check_messages, render_chat
from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams
from octavo.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatPlan:
    """A chat, ready for an engine."""

    prompt: dict[str, Any]
    """For `LLM.generate`, `AsyncLLM.stream` and the others: the rendered text as "prompt", and its "prompt_token_ids",
    to which nothing is added."""
    params: SamplingParams
    """The caller's, with the grammar that the output needs, if any."""
    _first: Callable[[], Stage]
    _unwanted: frozenset[str]

    def parser(self) -> ChatParser:
        """A new parser; each output needs one."""
        return ChatParser(self._first(), self._unwanted)


@dataclass(frozen=True)
class ChatSketch:
    """A chat of which all is known but the prompt."""

    chats: list[list[dict[str, Any]]]
    """What to render: the second, if there is one, where the template does not accept the messages of the first."""
    template: str
    tools: list[dict[str, Any]] | None
    """For the template."""
    variables: Mapping[str, Any]
    _tokenizer: Tokenizer
    _params: SamplingParams
    _answer: Answer
    _offered: bool

    def render(self) -> str:
        """The prompt's text. Raises `RequestError`."""
        first, *others = self.chats
        try:
            return render_chat(**self.arguments(first))
        except RequestError as error:
            if error.field != "messages" or not others:
                raise
            return render_chat(**self.arguments(others[0]))

    def arguments(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Those of `render_chat`, as plain data."""
        rest = dict(self.variables)
        ends = {"add_generation_prompt": True, "continue_final_message": False}
        given = {name: rest.pop(name, value) for name, value in ends.items()}
        variables = {**self._tokenizer.named_special_tokens, **rest}
        return {"template": self.template, "messages": messages, "tools": self.tools, "variables": variables, **given}

    def plan(self, text: str) -> ChatPlan:
        """With the text that was rendered. Raises `RequestError`."""
        tokenizer, params, answer = self._tokenizer, self._params, self._answer
        thoughts = Thoughts.of(self.template, text)
        grammar = answer.grammar(tokenizer, thoughts)
        if grammar is not None and params.structured_outputs is not None:
            message = "structured_outputs cannot be combined with tools or a JSON schema"
            raise RequestError(message, "structured_outputs")
        changes: dict[str, Any] = {} if grammar is None else {"structured_outputs": grammar}
        marks = {
            mark
            for mark in (*(answer.form.marks if self._offered else ()), *thoughts.marks)
            if special_token(tokenizer, mark) is not None
        }
        unwanted = frozenset[str]()
        if marks and params.skip_special_tokens:
            changes["skip_special_tokens"] = False
            texts = {tokenizer.backend.id_to_token(token) or "" for token in tokenizer.special_ids}
            unwanted = frozenset(texts - marks - {""})
        ids = tokenizer.encode(text, add_special_tokens=False)
        return ChatPlan(
            {"prompt": text, "prompt_token_ids": ids},
            replace(params, **changes),
            lambda: thoughts.stage(answer.stage),
            unwanted,
        )


def plan_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], params: SamplingParams, **options: Any
) -> ChatPlan:
    """Prepare one answer of the assistant. `options` are those of `sketch_chat`, which says what is raised."""
    sketch = sketch_chat(tokenizer, messages, params, **options)
    return sketch.plan(sketch.render())


def sketch_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str = "auto",
    parallel_tool_calls: bool | None = None,
    json_schema: Mapping[str, Any] | None = None,
    json_object: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    reason: Reason = schema_reason,
) -> ChatSketch:
    """`plan_chat` up to where the template is rendered.

    Args:
        messages: OpenAI's form: role, content, tool_calls [{"id", "type", "function": {"name", "arguments": JSON text
            or a dict}}], tool_call_id, name, reasoning_content.
        tools: OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}. A tool takes no
            arguments but those that its parameters name, unless these say something else.
        tool_choice: "auto": text, or calls; "required": at least one call; a tool's name: one call of it; "none": text,
            and the model is told of no tools.
        parallel_tool_calls: False: one call at most; True: several, where the model's form of calls has room for them.
            None: several, if the model's template knows of tools: others would go on calling.
        json_schema: the content is JSON that satisfies it; with "auto" the answer is that or calls. The model is shown
            it too, in the system message: names and descriptions say what is wanted.
        json_object: the content is any JSON object.
        chat_template, chat_template_kwargs: as for `Tokenizer.apply_chat_template`.
        reason: who is asked whether a schema can be a grammar.

    Raises:
        RequestError: with field "messages", "tools", "tool_choice", "parallel_tool_calls", "json_schema",
            "structured_outputs" (of `params`, when tools or a schema need a grammar too), "chat_template" or
            "chat_template_kwargs".
    """
    if parallel_tool_calls not in (None, False, True):
        message = f"parallel_tool_calls must be True, False or None, not {parallel_tool_calls!r}"
        raise RequestError(message, "parallel_tool_calls")
    known = check_tools(tools, reason)
    choice = check_choice(tool_choice, known)
    schema = _schema(json_schema, json_object, reason)
    offered = list(tools or ()) if choice != "none" else []
    source = tokenizer.template_source(chat_template, tools=bool(offered))
    form = tool_format(source)
    chats = [form.messages(check_messages(messages), offered)]
    if json_schema is not None:
        chats = [tell_of_schema(chats[0], json_schema)]
    if json_schema is not None or (offered and not form.shows_tools):  # then the system message may be ours alone
        chats.append(without_system(chats[0]))
    shown = [_shown(tool) for tool in offered] if form.shows_tools and offered else None
    parallel = form.shows_tools if parallel_tool_calls is None else parallel_tool_calls
    answer = Answer(form, known if offered else [], choice, parallel, schema)
    return ChatSketch(chats, source, shown, chat_template_kwargs or {}, tokenizer, params, answer, bool(offered))


def _schema(schema: object, json_object: bool, reason: Reason) -> Mapping[str, Any] | None:
    if schema is None:
        return {"type": "object"} if json_object else None
    if json_object:
        raise RequestError("json_schema and json_object exclude each other: give one", "json_schema")
    if not isinstance(schema, Mapping):
        raise RequestError(f"json_schema must be a dict, not {type(schema).__name__}", "json_schema")
    why = unsupported(schema, reason)
    if why:
        raise RequestError(f"json_schema is not supported: {why}", "json_schema")
    return schema


def _shown(tool: Mapping[str, Any]) -> dict[str, Any]:
    """With all that a template may read."""
    function = {"description": "", "parameters": {"type": "object", "properties": {}}}
    given = {name: value for name, value in tool["function"].items() if value is not None}
    return {"type": "function", **tool, "function": {**function, **given}}
