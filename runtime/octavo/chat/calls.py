"""Tool calls in an output, read stage by stage (see `stages`). `formats/` puts the stages together."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from octavo.chat.scan import JsonScanner, Source
from octavo.chat.stages import Next, Output, Stage

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ARGUMENTS = ("arguments", "parameters")


class ObjectCall:
    """One call as a JSON object: {"name": ..., "arguments" or "parameters": {...}}.

    Args:
        ahead: what was read before it and is text, should this be no call.
        after: makes the stage after the call.
        prose: makes the stage that reads on if this is no call.
        closing: the text that ends a call, whatever came before it.
        known: names of tools, if nothing but "{" marked a call, which is read already: then an object is a call only
            if it has such a name and an object of arguments.
    """

    def __init__(
        self, ahead: str, after: Next, prose: Next, *, closing: str | None = None, known: Collection[str] | None = None
    ) -> None:
        self._ahead, self._after, self._prose, self._closing, self._known = ahead, after, prose, closing, known
        self._read = ""
        """What was taken, as long as it may have to be given back."""
        self._expected = "{" if known is None else '"'
        self._key = ""
        self._name: str | None = None
        self._begun = False
        self._arguments: str | None = None
        """Those that came before the name."""
        self._scanner: JsonScanner | None = None

    def read(self, source: Source, out: Output) -> Stage | None:
        if self._scanner is not None:
            self._value(source, self._scanner)
            if self._scanner.bad:
                return self._no_call(source, out)
            if not self._scanner.done:
                return self._cut(source, out) if source.ended else None
            self._scanner = None
        self._take(source, source.spaces())
        if source.text:
            return self._step(source, out)
        return self._cut(source, out) if source.ended else None

    def _step(self, source: Source, out: Output) -> Stage | None:
        """Read one thing."""
        first = source.text[0]
        if first == "}" and self._expected in ('"', ","):
            return self._end(source, out)
        if self._expected in ("{", ":", ","):
            if first != self._expected:
                return self._no_call(source, out)
            self._take(source, 1)
            self._expected = "value" if first == ":" else '"'
            return self
        if self._expected == '"' or (self._key == "name" and self._name is None):
            return self._text(source, out)
        self._expected = ","
        if self._key not in _ARGUMENTS or self._arguments is not None:
            self._key, self._scanner = "", JsonScanner()
            return self
        if self._known is not None and (first != "{" or self._name not in (None, *self._known)):
            return self._no_call(source, out)
        if self._name is None:
            self._scanner = JsonScanner()
            return self
        self._begin(out)
        self._arguments = ""
        return Arguments(lambda: self, lambda: Leftover(self._closing, self._after))

    def _text(self, source: Source, out: Output) -> Stage | None:
        """A key, or the name's value."""
        string = _STRING.match(source.text)
        if string is None:
            if source.text[0] != '"':
                return self._no_call(source, out)
            return self._cut(source, out) if source.ended else None
        try:
            text = json.loads(string[0], strict=False)
        except ValueError:
            return self._no_call(source, out)
        self._take(source, string.end())
        if self._expected == '"':
            self._key, self._expected = text, ":"
            return self
        self._expected = ","
        self._name = text
        if self._known is None or (self._arguments is not None and text in self._known):
            self._begin(out)
        return self

    def _value(self, source: Source, scanner: JsonScanner) -> None:
        """Take what belongs to a value that is not handed out (now)."""
        piece = self._take(source, scanner.feed(source.text))
        if self._key:
            self._arguments = (self._arguments or "") + piece

    def _begin(self, out: Output) -> None:
        if self._begun or self._name is None:
            return
        self._begun = True
        out.call(self._name)
        out.arguments(self._arguments or "")

    def _end(self, source: Source, out: Output) -> Stage:
        if not self._begun:
            return self._no_call(source, out)
        self._take(source, 1)
        if self._arguments is None:
            out.arguments("{}")
        return self._after()

    def _no_call(self, source: Source, out: Output) -> Stage:
        """Malformed."""
        if self._begun:
            return Leftover(self._closing, self._after)
        source.text = self._read + source.text
        out.text(self._ahead)
        return self._prose()

    def _cut(self, source: Source, out: Output) -> Stage:
        """The output ended before the call did. Half a key is dropped, and a marker with nothing after it."""
        if self._begun or (not self._read.strip() and not source.text and self._known is None):
            source.text = ""
            return self._after()
        return self._no_call(source, out)

    def _take(self, source: Source, count: int) -> str:
        piece = source.take(count)
        if not self._begun:
            self._read += piece
        return piece


class Arguments:
    """A JSON value, handed out as it comes."""

    def __init__(self, after: Next, broken: Next) -> None:
        self._after, self._broken, self._scanner = after, broken, JsonScanner()

    def read(self, source: Source, out: Output) -> Stage | None:
        out.arguments(source.take(self._scanner.feed(source.text)))
        if self._scanner.bad:
            return self._broken()
        return self._after() if self._scanner.done else None


class Leftover:
    """The rest of a broken call, up to `closing`: it is kept as part of the arguments."""

    def __init__(self, closing: str | None, after: Next) -> None:
        self._closing, self._after = closing, after

    def read(self, source: Source, out: Output) -> Stage | None:
        place = source.text.find(self._closing) if self._closing else -1
        if place >= 0:
            out.arguments(source.take(place).rstrip())
            return self._after()
        if source.ended or not self._closing:
            out.arguments(source.take(len(source.text)))
        return None


class Between:
    """What must follow a call, such as a closing mark or a comma; blanks before it are nothing."""

    def __init__(self, expected: dict[str, Next], otherwise: Next) -> None:
        self._expected, self._otherwise = expected, otherwise

    def read(self, source: Source, out: Output) -> Stage | None:
        rest = source.text.lstrip()
        for text, then in self._expected.items():
            if rest.startswith(text):
                source.take(source.spaces() + len(text))
                return then()
        if any(text.startswith(rest) for text in self._expected):
            if source.ended:  # cut inside it
                source.text = ""
            return None
        return self._otherwise()
