"""What an answer may be made of, as a grammar and as the stages that read it. Made by `plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.chat.formats.base import ToolFormat
from octavo.chat.lark import Lark, pattern, without
from octavo.chat.stages import AtStart, Prose, Stage, Start, Thinking
from octavo.chat.tools import Tool
from octavo.structured_outputs import StructuredOutputsParams
from octavo.tokenizer import Tokenizer

_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Marks of thoughts, at the beginning of an output."""


@dataclass(frozen=True)
class Thoughts:
    """Whether a model thinks before it answers. `marks`: at the beginning and end of thoughts; empty: it does not.
    `opened`: the prompt ends with the first mark."""

    marks: tuple[str, ...] = ()
    opened: bool = False

    @classmethod
    def of(cls, template: str, prompt: str) -> Thoughts:
        """By the template's source, and by the prompt that it rendered."""
        for begin, end in _THINKING:
            if begin not in template and end not in template:
                continue
            if prompt.rstrip().endswith(end):
                return cls()  # the prompt has them already, perhaps empty
            return cls((begin, end), prompt.rstrip().endswith(begin))
        return cls()

    def rule(self, lark: Lark) -> str:
        """Rule for thoughts: any text up to the last mark."""
        begin, end = self.marks
        thoughts = lark.up_to("thoughts", lark.rule("ANY", "/(?s:.*)/"), end)
        return thoughts if self.opened else f"{lark.mark(begin)} {thoughts}"

    def stage(self, then: Callable[[bool], Stage]) -> Stage:
        """`then` makes the stage after them; it is told whether there were any."""
        if not self.marks:
            return then(False)
        return Thinking((self.marks[0], self.marks[1]), self.opened, then)


@dataclass(frozen=True)
class Answer:
    """What comes after the thoughts: calls of `tools` (none: text), JSON (`schema`), or text."""

    form: ToolFormat
    tools: Sequence[Tool]
    choice: str
    parallel: bool
    schema: Mapping[str, Any] | None

    # -- its grammar -------------------------------------------------------------------------------------------------

    def grammar(self, tokenizer: Tokenizer, thoughts: Thoughts) -> StructuredOutputsParams | None:
        """None: the output is free."""
        if not self.tools:
            if self.schema is None:
                return None
            if not thoughts.marks:
                return StructuredOutputsParams(json=self.schema)
        lark = Lark(tokenizer)
        lark.rule("start", "answer")
        answer = self._answer(lark, thoughts)
        if thoughts.marks:
            gap = "" if self._may_be_text else '("\\n" | "\\n\\n")? '
            thought = f"{thoughts.rule(lark)} {gap}answer"
            lark.rule("start", thought if thoughts.opened else f"{thought} | answer")
        lark.rule("answer", answer)
        return StructuredOutputsParams(grammar=lark.text())

    @property
    def _may_be_text(self) -> bool:
        return self.schema is None and (self.choice == "auto" or not self.tools)

    def _answer(self, lark: Lark, thoughts: Thoughts) -> str:
        if not self.tools:
            return lark.schema("content", self.schema or {})
        form, forced = self.form, self.choice != "auto"
        of_all = self.choice in ("auto", "required")
        tools = self.tools if of_all else [tool for tool in self.tools if tool.name == self.choice]
        after = form.calls(lark, tools, self.parallel and of_all)
        marker = form.markers[0]
        calls = f"{lark.mark(marker)}{'?' if form.bare else ''} {after}"
        if forced:
            return calls
        if self.schema is not None:
            return f"{lark.schema('content', self.schema)} | {calls}"
        text = without(*form.markers)
        if form.bare:
            text += r" & ~/\s*\{(?s:.*)/"
        if thoughts.marks and not thoughts.opened:
            text += rf" & ~/\s*{pattern(thoughts.marks[0])}(?s:.*)/"
        lark.rule("TEXT", text)
        return f"TEXT | {calls}" if form.bare else f"TEXT | {lark.up_to('opening', 'TEXT', marker)} {after}"

    # -- reading it --------------------------------------------------------------------------------------------------

    def stage(self, fresh: bool) -> Stage:
        """The first stage. `fresh`: thoughts came before it."""
        if not self.tools:
            return Prose({}, fresh=fresh)
        names = frozenset(tool.name for tool in self.tools)
        starts: dict[str, Start] = {}
        anywhere = starts if self.schema is None else {}  # what stands in JSON is no marker

        def prose() -> Stage:
            return Prose(anywhere)

        def after() -> Stage:
            return Prose(anywhere if self.parallel else {}, after_call=True)

        for marker in self.form.markers:
            starts[marker] = self.form.start(prose, after, None)
        first: dict[str, Start] = {**starts}
        if self.form.bare:
            first["{"] = self.form.start(prose, after, names)
        if self.schema is None and not self.form.bare:
            return Prose(starts, fresh=fresh)
        return AtStart(first, lambda: Prose(anywhere, fresh=fresh))
