"""Formats of tool calls, and which of them a chat template wants."""

from __future__ import annotations

import re

from octavo.chat.formats.base import ToolFormat as ToolFormat
from octavo.chat.formats.generic import Generic
from octavo.chat.formats.hermes import Hermes
from octavo.chat.formats.llama import TAG, Llama
from octavo.chat.formats.mistral import BEGIN, Mistral

_NO_JSON = ("<function=", "<arg_key>")
_PIECES = re.compile(r"\{%|[}%]")
_TOOLS = re.compile(r"\btools\b")


def tool_format(template: str) -> ToolFormat:
    """By the template's source: whether it reads `tools`, and the marks that it writes. Calls that are no JSON are not
    supported; such a template gets the generic format, which does without its tools section."""
    if not _reads_tools(template):
        return Generic()
    if BEGIN in template:
        return Mistral(template)
    if "<tool_call>" in template and not any(mark in template for mark in _NO_JSON):
        return Hermes()
    if TAG in template or ("ipython" in template and '"parameters": ' in template):
        return Llama()
    return Generic()


def _reads_tools(template: str) -> bool:
    """`tools` stands after "{{" or "{%", with neither "}" nor "%" between. In time that grows as the source does: it
    may be a client's."""
    opened, place = False, 0
    for mark in (*_PIECES.finditer(template), None):
        piece = template[place : len(template) if mark is None else mark.start()]
        begin = 0 if opened else piece.find("{{")
        if begin >= 0 and _TOOLS.search(piece, begin):
            return True
        if mark is not None:
            opened, place = mark.group() == "{%", mark.end()
    return False
