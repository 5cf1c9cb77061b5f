"""Writing Lark grammars for chat output, in the dialect of llguidance. Used by `plan` and by `formats/`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from octavo.decode.grammar import json_grammar
from octavo.tokenizer import Tokenizer


class Lark:
    """A grammar that grows rule by rule."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: dict[str, str] = {}

    def rule(self, name: str, body: str) -> str:
        """Add a rule (lower case) or a terminal (upper case); returns the name."""
        self._rules[name] = body
        return name

    def schema(self, name: str, schema: Mapping[str, Any]) -> str:
        """A rule for a JSON value that satisfies `schema`, a document of its own: its "$ref"s stay inside it."""
        return self.rule(name, f"%json {json_grammar(schema)}")

    def mark(self, text: str) -> str:
        """`text` in a rule: as the special token that it is, or spelled out."""
        token = special_token(self._tokenizer, text)
        return quoted(text) if token is None else f"<[{token}]>"

    def up_to(self, name: str, plain: str, mark: str) -> str:
        """Text of the terminal `plain`, possibly empty, up to the first `mark`, and that. `name`: of a rule for it."""
        if special_token(self._tokenizer, mark) is not None:
            return f"{plain}? {self.mark(mark)}"
        return self.rule(f"{name}[lazy]", f"{plain} {quoted(mark)}").removesuffix("[lazy]")

    def text(self) -> str:
        return "%llguidance {}\n" + "".join(f"{name}: {body}\n" for name, body in self._rules.items())


def special_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of `text` if it is a special token, which is left out of texts unless asked for."""
    token = tokenizer.backend.token_to_id(text)
    return token if token is not None and token in tokenizer.special_ids else None


def quoted(text: str) -> str:
    """A string literal."""
    return json.dumps(text, ensure_ascii=False)


def without(*texts: str) -> str:
    """A terminal: any text in which none of `texts` stands."""
    return " & ".join(["/(?s:.*)/", *(f"~/(?s:.*){pattern(text)}(?s:.*)/" for text in texts)])


def pattern(text: str) -> str:
    """`text` inside a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/")
