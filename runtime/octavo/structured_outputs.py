"""`StructuredOutputsParams`: what form an output must have. A field of `SamplingParams`, with vLLM's names;
`decode/grammar.py` compiles it."""

from __future__ import annotations

import json as json_library
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.errors import RequestError

MAX_BYTES = 1 << 20
"""Of a grammar's source. What is longer takes seconds to read, and no output gets better by it."""


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of the fields. Tokens that would lead out of the form are never made, and where the tokens left
    become few, those that complete it are: so an output has the form, unless `max_tokens` leaves no room for it.

    Raises `RequestError` with field "structured_outputs". What the grammar engine does not support (a keyword of JSON
    Schema, look-ahead in a regular expression) is a `RequestError` too, before the first token.
    """

    json: Mapping[str, Any] | str | None = None
    """A JSON schema, as a dict or as text. Output is one line, separated as by `json.dumps`."""
    regex: str | None = None
    """A regular expression (of Rust's regex library: no look-around, no back references) for the whole output."""
    choice: Sequence[str] | None = None
    """One of these strings."""
    grammar: str | None = None
    """A context-free grammar: Lark in the dialect of llguidance, or GBNF (`root ::= ...`)."""
    json_object: bool | None = None
    """True: any JSON object."""

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise _error(f"give one of json, regex, choice, grammar and json_object, not {', '.join(given) or 'none'}")
        if self.json_object not in (None, False, True):
            raise _error(f"json_object must be True or left out, not {self.json_object!r}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise _error(f"{name} must be a string that is not empty, not {type(value).__name__}")
        if self.choice is not None:
            if isinstance(self.choice, str) or not isinstance(self.choice, Sequence) or not self.choice:
                raise _error("choice must be a list of strings that is not empty")
            if not all(isinstance(one, str) and one for one in self.choice):
                raise _error("choice must hold strings that are not empty")
            object.__setattr__(self, "choice", tuple(self.choice))
        if sum(len(str(value)) for value in (self.json, self.regex, self.choice, self.grammar)) > MAX_BYTES:
            raise _error(f"the grammar is longer than {MAX_BYTES} characters")


def _schema(schema: object) -> str:
    """As text, which nobody can change later."""
    try:
        value = json_library.loads(schema) if isinstance(schema, str) else schema
        text = json_library.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(f"json is no JSON schema: {str(error)[:200]}") from error
    if not isinstance(value, Mapping):
        raise _error(f"json must be a JSON schema (an object), not {type(value).__name__}")
    return text


def _error(message: str) -> RequestError:
    return RequestError(message, "structured_outputs")
