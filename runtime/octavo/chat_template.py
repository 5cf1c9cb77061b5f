"""From chat messages to the prompt text, by the Jinja template that comes with a model.

Called by `tokenizer.Tokenizer`.

A template is code from a stranger. It runs in Jinja's immutable sandbox, sees only plain JSON values, and has bounds on
its loops, its time and the size of what it builds. Apart from that it renders as transformers does: same whitespace
rules, same functions, same filters (a test compares the two).
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from octavo.errors import RequestError

_MAX_ITERATIONS, _MAX_SECONDS, _MAX_SIZE = 1_000_000, 5.0, 32 << 20
_MAX_DEPTH = 100
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render `messages` with `template`.

    Args:
        template: Jinja source.
        messages: dicts with "role" and "content"; the content is a string or a list of text parts, which are joined
            without a separator. An assistant message with "tool_calls" may have no content.
        tools: JSON schemas of functions, as the OpenAI API takes them.
        add_generation_prompt: end with the header of the assistant's answer.
        continue_final_message: leave the last message open, so that the model continues it.
        variables: what else the template may read, such as `bos_token` or `enable_thinking`.

    Raises:
        RequestError: with field "messages" when they are malformed or the template rejects them, "tools" or
            "chat_template_kwargs" for those, and "chat_template" when the template itself is at fault.
    """
    if continue_final_message and add_generation_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other: set one of them to False"
        raise RequestError(message, field="continue_final_message")
    chat = check_messages(messages)
    opened = ""
    if continue_final_message:
        opened = chat[-1]["content"]
        chat[-1]["content"] = opened + _TAG
    text = _render(
        template,
        **_plain(dict(variables or {}), "chat_template_kwargs"),
        messages=chat,
        tools=_check_tools(tools),
        add_generation_prompt=add_generation_prompt,
    )
    return _cut_at_tag(text, opened) if continue_final_message else text


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A plain copy of `messages` whose contents are strings; a `RequestError` that names the first bad one."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError("messages must be a list of {'role': ..., 'content': ...}", field="messages")
    if not messages:
        raise RequestError("messages is empty: give at least one", field="messages")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{index}] is a {type(message).__name__}, not a dict", field="messages")
        plain: dict[str, Any] = _plain(dict(message), "messages")
        role = plain.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"messages[{index}] needs a 'role', such as 'user'", field="messages")
        plain["content"] = _content(plain, index)
        reasoning = next((plain[k] for k in ("reasoning_content", "thinking", "reasoning") if plain.get(k)), None)
        if reasoning is not None:  # templates differ in the name they read
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        checked.append(plain)
    return checked


def _content(message: dict[str, Any], index: int) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list):
        raise RequestError(f"messages[{index}] needs a 'content': a string or a list of text parts", field="messages")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(
                f"messages[{index}] has a {kind!r} part; only text parts are supported", field="messages"
            )
        texts.append(text)
    return "".join(texts)


def _check_tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise RequestError("tools must be a list of JSON schemas", field="tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{index}] is a {type(tool).__name__}, not a JSON schema", field="tools")
    return [_plain(dict(tool), "tools") for tool in tools]


def _plain(value: Any, field: str, depth: int = 0) -> Any:
    """A copy made of JSON types only: an object with methods would hand them to the template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > _MAX_DEPTH:
        raise RequestError(f"{field} is nested too deeply", field=field)
    if isinstance(value, Mapping):
        return {_plain(key, field, depth + 1): _plain(item, field, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, field, depth + 1) for item in value]
    for base in (str, int, float):  # subclasses, such as enumerations, lose their methods
        if isinstance(value, base):
            return base.__str__(value) if base is str else base(value)
    raise RequestError(f"{field} holds a {type(value).__name__}; only JSON types can go into a template", field=field)


def _cut_at_tag(text: str, opened: str) -> str:
    place = text.rfind(_TAG.strip())
    if place < 0 or opened.strip() not in text:
        message = "the chat template changes the final message, so it cannot be continued"
        raise RequestError(message, field="continue_final_message")
    kept = text[:place]
    # a template that trims contents took our trailing blank away, so the message's own went the same way
    return kept if text.startswith(_TAG, place) else kept.rstrip()


# -- the sandbox -----------------------------------------------------------------------------------------------------


class _RejectedByTemplate(TemplateError):
    """The template called `raise_exception`: it does not accept these messages."""


class _Budget(threading.local):
    """What the render running in this thread may still do."""

    iterations = 0
    deadline = math.inf


_budget = _Budget()


def _render(template: str, **variables: Any) -> str:
    try:
        compiled = _compile(template)
        _budget.iterations, _budget.deadline = _MAX_ITERATIONS, time.monotonic() + _MAX_SECONDS
        pieces, size = [], 0
        for piece in compiled.generate(**variables):
            size += len(piece)
            _bound(size)
            pieces.append(piece)
        return "".join(pieces)
    except _RejectedByTemplate as error:
        raise RequestError(f"the chat template does not accept these messages: {error}", field="messages") from error
    except TemplateSyntaxError as error:
        raise RequestError(f"the chat template has a syntax error: {error}", field="chat_template") from error
    except RecursionError as error:
        raise RequestError("the chat template is nested too deeply", field="chat_template") from error
    except Exception as error:  # a template can raise anything Python can: a TypeError, a KeyError, ...
        message = f"the chat template failed: {type(error).__name__}: {str(error)[:500]}"
        raise RequestError(message, field="chat_template") from error


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    if not isinstance(template, str):
        raise RequestError("chat_template must be a string", field="chat_template")
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    for name in ("center", "indent", "wordwrap", "batch", "slice"):
        environment.filters[name] = _bounded_arguments(environment.filters[name])
    environment.filters["format"] = _format
    environment.globals.pop("lipsum")
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _TemplateNamespace,
        "__octavo_tick": _tick,
        "__octavo_concat": _concat,
    }
    return environment


def _raise_exception(message: object) -> None:
    raise _RejectedByTemplate(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which is wrong in a prompt
    _bound(indent if isinstance(indent, int) else 0)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _format(form: Any, *args: Any, **kwargs: Any) -> str:
    _bound(_largest_width(str(form), args))
    return str(form) % (kwargs or args)


def _tick() -> bool:
    """Run before every turn of every loop (see `_Sandbox._parse`)."""
    _budget.iterations -= 1
    if _budget.iterations < 0 or time.monotonic() > _budget.deadline:
        raise SecurityError("it loops for too long")
    return True


def _concat(*parts: object) -> str:
    texts = [str(part) for part in parts]
    _bound(sum(map(len, texts)))
    return "".join(texts)


def _bound(size: float) -> None:
    if size > _MAX_SIZE:
        raise SecurityError(f"it builds something larger than {_MAX_SIZE} characters")


def _bounded_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _bound(value)
        return function(*args, **kwargs)

    for name, value in vars(function).items():  # Jinja's marks: what to pass first
        setattr(bounded, name, value)
    return bounded


class _TemplateNamespace(Namespace):
    """Jinja's namespace without underscore names, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # the same odd signature as the base: `namespace(self=1)` is legal
        self, rest = args[0], args[1:]
        for name in dict(*rest, **kwargs):
            _check_name(name)
        Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attributes cannot start with an underscore: {name!r}")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote, for training. Here: just its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, with bounds on time and size."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            tick = nodes.Call(nodes.Name("__octavo_tick", "load"), [], [], None, None, lineno=loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(tick, lineno=loop.lineno))
            if loop.test is not None:
                loop.test = nodes.And(tick, loop.test, lineno=loop.lineno)
        _BoundedConcats().visit(tree)
        tree.set_environment(self)  # the new nodes need it too
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sized = (str, list, tuple)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, sized) and isinstance(other, int):
                    _bound(len(one) * other)
            if isinstance(left, int) and isinstance(right, int):
                _bound(left.bit_length() + right.bit_length())
        elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            _bound(len(left) + len(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bound(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            _bound(_largest_width(left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
                _bound(_largest_integer([args, kwargs]))
            elif name in ("format", "format_map"):
                nested = re.search(r":[^}]*\{", owner)  # a width that is itself a field
                _bound(max(_largest_width(owner, ()), _largest_integer([args, kwargs]) if nested else 0))
            elif name in ("replace", "join") and args:
                _bound(len(owner) * max((len(value) for value in args if isinstance(value, str | list)), default=0))
        return super().call(__context, __obj, *args, **kwargs)


def _largest_integer(value: Any) -> int:
    """The largest integer anywhere in plain data."""
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    return max(map(_largest_integer, value), default=0) if isinstance(value, list | tuple) else 0


def _largest_width(form: str, values: Any) -> int:
    """The largest number in a format string, or given to one of its `*` fields."""
    widths = [int(digits[:12]) for digits in re.findall(r"\d+", form)]
    given = values if isinstance(values, tuple) else (values,)
    if "*" in form:
        widths += [value for value in given if isinstance(value, int)]
    return max(widths, default=0)


class _BoundedConcats(NodeTransformer):
    """Replaces every `a ~ b` by a call of `_concat`, which knows when to stop."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        name = nodes.Name("__octavo_concat", "load")
        return nodes.Call(name, node.nodes, [], None, None, lineno=node.lineno)
