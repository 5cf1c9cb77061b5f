"""Reading text that comes in pieces: a buffer, and a scanner for one JSON value. Used by `stages`."""

from __future__ import annotations

import re

_PLAIN = re.compile(r'[^"{}\[\],\s]+|\s+|,+')
_IN_STRING = re.compile(r'[^"\\]+')


class Source:
    """Text that came and is not read yet. `ended`: no more will come."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def take(self, count: int) -> str:
        """Read `count` characters."""
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def spaces(self) -> int:
        """Blanks at the beginning of what is left."""
        return len(self.text) - len(self.text.lstrip())


class JsonScanner:
    """Finds where one JSON value ends. It counts brackets and knows strings; what stands between is not checked."""

    def __init__(self) -> None:
        self.done = False
        self.bad = False
        """A bracket closes what was not opened: this is no JSON."""
        self._open: list[str] = []
        self._in_string = self._escaped = self._scalar = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the value. All of them, unless `done` or `bad` is set."""
        place = 0
        while place < len(text) and not (self.done or self.bad):
            place = self._string(text, place) if self._in_string else self._value(text, place)
        return place

    def _string(self, text: str, place: int) -> int:
        if self._escaped:
            self._escaped = False
            return place + 1
        run = _IN_STRING.match(text, place)
        if run:
            return run.end()
        self._escaped = text[place] == "\\"
        if text[place] == '"':
            self._in_string = False
            self.done = not self._open
        return place + 1

    def _value(self, text: str, place: int) -> int:
        character = text[place]
        if self._scalar and (character in '"{}[],' or character.isspace()):
            self.done = True
            return place
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._open.append("}" if character == "{" else "]")
        elif character in "}]":
            if not self._open or self._open.pop() != character:
                self.bad = True
                return place
            self.done = not self._open
        elif not self._open and (character == "," or character.isspace()):
            self.bad = True
            return place
        else:
            run = _PLAIN.match(text, place)
            self._scalar = not self._open
            return run.end() if run else place + 1
        return place + 1
