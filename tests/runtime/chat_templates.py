"""Small chat templates in the form of those that come with models, and tokenizers with their special tokens. Shared by
the tests of `octavo.chat`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import tokenizers
from octavo.models.sources import DEFAULT_MODEL, resolve
from octavo.tokenizer import Tokenizer, load_tokenizer

PLAIN = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

HERMES = """
{%- if tools -%}
<|im_start|>system
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call> to use one.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

THINKING = (
    HERMES.rstrip().removesuffix("{% endif -%}")
    + """
{%- if enable_thinking is defined and enable_thinking is false -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""
)
"""May think first, as Qwen3 does; `enable_thinking=False` writes empty thoughts into the prompt."""

OPENED = (
    HERMES.rstrip().removesuffix("{% endif -%}")
    + """<think>
{% endif -%}
"""
)
"""The prompt begins the thoughts, as DeepSeek-R1's does."""

LLAMA = """
{{- bos_token }}
{%- for message in messages %}
    {%- if loop.first and tools %}
        {{- "<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n" }}
        {%- for tool in tools %}
            {{- tool | tojson }}
        {%- endfor %}
        {{- "<|eot_id|>" }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {%- set role = "ipython" if message.role == "tool" else message.role %}
        {{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" + message.content + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""

MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if loop.first and tools %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message.content + "[/INST]" }}
    {%- elif message.tool_calls %}
        {{- CALLS }}
    {%- elif message.role == "tool" %}
        {%- if message.tool_call_id | length != 9 %}{{ raise_exception("ids have nine letters") }}{% endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_ARRAY = MISTRAL.replace(
    "{{- CALLS }}",
    """
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception("ids have nine letters") }}{% endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (", " if not loop.last else "]") }}
        {%- endfor %}
        {{- eos_token }}""",
)
"""An array of calls."""
_NAMED = """
        {%- for call in message.tool_calls %}
            {{- "[TOOL_CALLS]" + call.function.name + MARKS + call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}"""
MISTRAL_NAMED = MISTRAL.replace("{{- CALLS }}", _NAMED.replace("MARKS +", ""))
MISTRAL_ARGS = MISTRAL.replace("{{- CALLS }}", _NAMED.replace("MARKS", '"[ARGS]"'))
MISTRAL_IDS = MISTRAL.replace("{{- CALLS }}", _NAMED.replace("MARKS", '"[CALL_ID]" + call.id + "[ARGS]"'))
"""A marker, a name and arguments for each call; later with marks between them."""

TEMPLATES = {
    "generic": PLAIN, "hermes": HERMES, "thinking": THINKING, "opened": OPENED, "llama": LLAMA,
    "mistral array": MISTRAL_ARRAY, "mistral named": MISTRAL_NAMED, "mistral args": MISTRAL_ARGS,
    "mistral ids": MISTRAL_IDS,
}  # fmt: skip

_SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
    "mistral": ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
                "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
}  # fmt: skip
_ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


@lru_cache
def tokenizer_for(name: str) -> Tokenizer:
    """The default model's tokenizer with the template and the special tokens of a family. The marks of Hermes' form
    are single tokens, and no special ones, in families that have them."""
    own = load_tokenizer(resolve(DEFAULT_MODEL))
    family = name.split()[0]
    backend = tokenizers.Tokenizer.from_str(own.backend.to_str())
    if family in _SPECIAL:
        backend.add_special_tokens(_SPECIAL[family])
    elif family != "generic":
        backend.add_tokens(_ADDED)
    settings: dict[str, Any] = {
        "chat_template": TEMPLATES[name], "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
    }  # fmt: skip
    return Tokenizer(backend, settings, name)
