"""`chat_template`: what transformers renders, from templates that are strangers' code."""

# ruff: noqa: F811 - fixtures are imported by name

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Any

import pytest
from files_fixtures import byte_level_backend, default_model  # noqa: F401 - a fixture
from octavo.chat_template import render_chat
from octavo.errors import RequestError
from octavo.models.sources import ModelFiles
from octavo.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {{- "Functions:\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.index > 6 %}{% break %}{% endif %}
    {%- if message.role == "ignored" %}{% continue %}{% endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- if message.reasoning_content is defined %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
    {%- for tool_call in message.tool_calls or [] if tool_call.type == 'function' %}
        {%- set function = tool_call.function %}
        {{- '\\n<tool_call>\\n' ~ {"name": function.name, "arguments": function.arguments} | tojson }}
        {{- '\\n</tool_call>' }}
    {%- endfor %}
    {% generation %}{{ '<|im_end|>' }}{% endgeneration %}
    {{ "%05d|%s" % (loop.index, loop.last) }}
{% endfor %}
{%- macro again(text, n) %}{{ text * n }}{% endmacro %}
{{ again("=", 3) }} {{ [1, 2] + [3] }} {{ 2 ** 10 }} {{ range(3) | list }} {{ dict(a=1) | tojson }}
{{ "a,b".split(",") | join("-") }} {{ "{:>4}{x}".format(7, x=1) }} {{ "%s-%s" | format(1, 2) }} {{ "x" | center(5) }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}
"""
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris <&> 'é'", "n": 1.5, "b": None}},
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": 'It\'s <b>"é"</b>', "parameters": {"type": "object"}},
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "  Hi <b>&amp;</b> \n"}],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raise %} 日本 👩‍👩‍👧"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>\nb", "reasoning_content": "r"},
    ],
]


@pytest.fixture(scope="module")
def hf() -> Any:
    return Tokenizer(byte_level_backend(), {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, "trained").hf


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]])
@pytest.mark.parametrize("template", ["CHATML", "LLAMA3", "QWEN", "default"])
def test_renders_as_transformers(
    hf: Any,
    default_model: ModelFiles,
    template: str,
    tools: Any,
    chat: int,
) -> None:
    ours = load_tokenizer(default_model)
    source = ours.chat_template if template == "default" else globals()[template]
    variables: dict[str, Any] = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    for prompt in (True, False):
        for extra in ({}, {"enable_thinking": False, "date_string": "1 May 2026"}):
            expected = hf.apply_chat_template(
                CHATS[chat], tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt, **extra
            )
            found = render_chat(
                source, CHATS[chat], tools=tools, add_generation_prompt=prompt, variables={**variables, **extra}
            )
            assert found == expected


@pytest.mark.parametrize("template", ["CHATML", "LLAMA3"])
@pytest.mark.parametrize("content", ["Sure, here", "Sure, here ", "a\n", "<|im_end|>"])
def test_continues_the_final_message_as_transformers(hf: Any, template: str, content: str) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    source = globals()[template]
    expected = hf.apply_chat_template(chat, chat_template=source, tokenize=False, continue_final_message=True)
    variables = {"bos_token": "<|endoftext|>"}
    found = render_chat(source, chat, add_generation_prompt=False, continue_final_message=True, variables=variables)
    assert found == expected
    assert chat[1]["content"] == content  # the caller's messages stay as they are


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}, "!"]
    assert (
        render_chat(CHATML, [{"role": "user", "content": parts}], add_generation_prompt=False).split("\n")[1]
        == "one two!<|im_end|>"
    )


@pytest.mark.parametrize(
    "messages",
    [
        "hi", b"hi", None, {}, {"role": "user", "content": "x"}, [], ["hi"], [None], [{}], [{"role": "user"}],
        [{"content": "x"}], [{"role": 3, "content": "x"}], [{"role": "", "content": "x"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": 3}], [{"role": "user", "content": {}}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [3]}],
        [{"role": "user", "content": "x", "extra": object()}],
    ],
)  # fmt: skip
def test_malformed_messages(messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        render_chat(CHATML, messages)
    assert caught.value.field == "messages"


def test_other_bad_arguments() -> None:
    chat = [{"role": "user", "content": "x"}]
    for tools in ("x", {"a": 1}, [3], 3):
        with pytest.raises(RequestError) as caught:
            render_chat(CHATML, chat, tools=tools)  # type: ignore[arg-type]
        assert caught.value.field == "tools"
    with pytest.raises(RequestError) as caught:
        render_chat(CHATML, chat, variables={"x": Path("/")})
    assert caught.value.field == "chat_template_kwargs"
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError, match="deeply"):
        render_chat(CHATML, chat, variables={"x": deep})
    with pytest.raises(RequestError) as caught:
        render_chat(CHATML, chat, continue_final_message=True)
    assert caught.value.field == "continue_final_message"


def test_who_is_at_fault() -> None:
    chat = [{"role": "user", "content": "x"}]
    cases = {
        "{{ raise_exception('roles must alternate') }}": ("messages", "roles must alternate"),
        "{% if %}": ("chat_template", "syntax"),
        "{{ messages[0].content + 1 }}": ("chat_template", "TypeError"),
        "{{ missing.attribute }}": ("chat_template", "missing"),
        "{% for m in 3 %}{% endfor %}": ("chat_template", "not iterable"),
        "{% include 'x' %}": ("chat_template", "failed"),
    }
    for template, (field, words) in cases.items():
        with pytest.raises(RequestError, match=words) as caught:
            render_chat(template, chat)
        assert caught.value.field == field


class Role(enum.StrEnum):
    USER = "user"


def test_enumerations_are_plain_strings() -> None:
    text = render_chat(
        "{{ messages[0].role }} {{ messages[0].role.name is defined }}", [{"role": Role.USER, "content": "x"}]
    )
    assert text == "user False"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__['time'] }}",
    "{{ namespace.__init__.__globals__ }}{{ namespace.__init__.__globals__['x'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context.environment.filters }}{{ self.__init__.__globals__.x }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).x.y }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace(__init__=1) %}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}{{ '{0.__class__.__init__.__globals__[x]}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ dict.__self__ }}{{ dict.__globals__.x }}",
    "{{ lipsum.__globals__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_way_out_of_the_sandbox(template: str) -> None:
    """Each is refused, or renders to nothing of value: never a class, a module or a file."""
    try:
        text = render_chat(template, [{"role": "user", "content": "x"}])
    except RequestError:
        return
    assert not any(word in text for word in ("class", "module", "function", "root:", "uid=")), text


COSTLY = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r if b < 0 %}x{% endfor %}{% endfor %}",
    "{{ range(999999999) | list }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' * 99999999999 }}",
    "{{ [0] * 99999999999 }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1, 2]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{1:{0[a][0]}}'.format({'a': [9999999999]}, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ 'a'.ljust(9999999999) }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ 'a' | indent(9999999999, true) }}",
    "{{ messages | tojson(indent=9999999999) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{% set a = 'a' * 30000000 %}{{ a.replace('a', a) }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
]


@pytest.mark.parametrize("template", COSTLY, ids=lambda template: template[:40])
def test_costly_templates_end_soon(template: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        render_chat(template, [{"role": "user", "content": "x"}])
    assert caught.value.field == "chat_template"
    assert time.perf_counter() - start < 8


def test_long_chats_are_within_bounds() -> None:
    """The bounds are far from what an honest chat needs: ten thousand messages of a kilobyte."""
    chat = [{"role": "user", "content": "x" * 1000}] * 10_000
    assert len(render_chat(CHATML, chat)) > 10_000_000
