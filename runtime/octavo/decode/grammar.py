"""Grammars: from a request's `StructuredOutputsParams` to the tokens that may come next.

`Grammars` belongs to an engine and compiles, on the caller's side; a `Grammar` is compiled and shared; each sequence
walks through it by a `Constraint` of its own, on the engine's thread. The library is llguidance: it compiles on
demand, so no pattern takes seconds, and needs nothing else installed (benchmarks/LOG.md has it beside xgrammar).
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.decode.closing import WaysOut
from octavo.errors import RequestError, RequestFailedError
from octavo.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

    from octavo.tokenizer import Tokenizer

KEPT, KEPT_SOURCE, KEPT_SECONDS = 256, 4 << 20, 10.0
"""Compiled grammars that an engine keeps: so many, of so many characters, that took so many seconds to compile. The
last two stand for memory, which the library does not tell: up to 85 bytes a character and 40 MB a second, by hand."""
_TRIED = 16
"""Steps that are tried."""
_LEAST_JUMP = 8
_LOST = 16
"""Tokens to wait before a way is looked for again where none was found."""
_MOST_PARTS = 64
"""Parts of a schema whose shortest value is looked for, the first that come."""
_JSON: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes it: what models have seen, and no room for spaces without end."""


def json_grammar(schema: Mapping[str, Any]) -> str:
    """A schema for a `%json` block of a Lark grammar, with the separators that all schemas have here."""
    return json.dumps({**schema, "x-guidance": {**_JSON, **schema.get("x-guidance", {})}})


class Grammars:
    """Compiles grammars for one tokenizer and keeps them. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ends = sorted({end for end in eos_token_ids if end < vocab_size})
        self._kept: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._lock, self._starting = threading.Lock(), threading.Lock()

    def known(self, params: StructuredOutputsParams) -> bool:
        """`compile` will not take time."""
        with self._lock:
            return params in self._kept

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Raises `RequestError` with field "structured_outputs" where the library does not support it."""
        with self._lock:
            grammar = self._kept.get(params)
            if grammar is not None:
                self._kept.move_to_end(params)
                return grammar
        with self._starting:  # the two are made once
            library, ways = self._library, self._ways
        grammar = Grammar(params, library, ways, self._ends)
        with self._lock:
            self._kept[params] = grammar
            self._drop()
        return grammar

    def _drop(self) -> None:
        """Those that were used longest ago, until the rest is within bounds. One may be beyond them alone."""
        kept = self._kept.values()
        size, seconds = sum(one.size for one in kept), sum(one.seconds for one in kept)
        while len(self._kept) > 1 and (len(self._kept) > KEPT or size > KEPT_SOURCE or seconds > KEPT_SECONDS):
            _, gone = self._kept.popitem(last=False)
            size, seconds = size - gone.size, seconds - gone.seconds

    def warm(self) -> None:
        """Make what all grammars share."""
        with self._starting:
            _ = self._library, self._ways

    @cached_property
    def _library(self) -> LLTokenizer:
        """0.2 s for 49152 tokens, at the first grammar."""
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = self._ends or [0]
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer, ends[0])), self._vocab_size, ends)

    @cached_property
    def _ways(self) -> WaysOut:
        return WaysOut(self._tokenizer, self._vocab_size)


class _Vocabulary:
    """What the library asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos, tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)


class Grammar:
    """A compiled grammar. `jump`: by how much a single token can lengthen the way to the end, about: it may begin the
    costliest part of a schema."""

    def __init__(
        self, params: StructuredOutputsParams, library: LLTokenizer, ways: WaysOut, ends: Sequence[int]
    ) -> None:
        self._library, self.ways, self._ends = library, ways, frozenset(ends)
        began = time.thread_time()
        source = _source(params)
        self.size = len(source)
        self._first = self._matcher(source)
        if self._first.is_error():
            raise RequestError(f"the grammar is not supported: {self._reason(self._first)}", "structured_outputs")
        self.jump = max([_LEAST_JUMP, *self._costs(_schemas(params))])
        self.ends = ways.mask_of(ends)
        self.seconds = time.thread_time() - began

    def try_out(self) -> None:
        """Go some steps of the shortest way that is known to an end, as an engine would: what the library puts off
        until it is asked is done here. Raises `RequestError` where it fails."""
        constraint, left = self.start(), _TRIED
        try:
            while left:
                token = self.ways.first(constraint.allowed(left))
                if token is None or token in self._ends or constraint.accept(token):
                    return
                left -= 1
        except RequestFailedError as error:
            raise RequestError(str(error), "structured_outputs") from error

    def start(self) -> Constraint:
        return Constraint(self, self._first.deep_copy())

    def _matcher(self, source: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        return LLMatcher(self._library, source, log_level=0, limits=LLParserLimits(verbose_errors=False))

    @staticmethod
    def _reason(matcher: LLMatcher) -> str:
        return str(matcher.get_error()).replace("<non-verbose/>", "").strip().split("\n\n")[0][:500]

    def _costs(self, schemas: Iterator[Mapping[str, Any]]) -> Iterator[int]:
        """Tokens of the shortest value of each part of the schemas, with its key."""
        from llguidance import LLMatcher

        for schema in schemas:
            for key, part in islice(_parts(schema), _MOST_PARTS):
                matcher = self._matcher(LLMatcher.grammar_from_json_schema(part, overrides=_JSON))
                way = None if matcher.is_error() else self.ways.find(matcher)
                if way is not None:
                    yield len(way) + len(key) // 2 + 4


class Constraint:
    """One sequence's way through a grammar."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._unhurried = 0
        """Tokens for which nobody need ask how far the end is."""
        self._way: list[int] | None = None

    def accept(self, token: int) -> bool:
        """Take in a token that was made. True: the grammar is complete, nothing can follow."""
        if not self._matcher.consume_token(token):
            raise self._error()
        self._way = self._way[1:] if self._way and self._way[0] == token else self._way
        return bool(self._matcher.is_stopped())

    def allowed(self, left: int) -> np.ndarray:
        """[words] int32: which tokens may come next, of `left` that may still be made."""
        mask = np.empty(self._grammar.ways.words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise self._error()
        self._unhurried -= 1
        if self._unhurried < 0:
            self._hurry(mask, left)
        return mask

    def _hurry(self, mask: np.ndarray, left: int) -> None:
        """Where few tokens are left, nothing new may begin; where just enough are, only the way out remains."""
        grammar = self._grammar
        way = self._way = self._way_out()
        if way is None:  # nobody knows how
            self._unhurried = _LOST
            return
        if not way:
            if left <= grammar.jump and not grammar.ways.in_text(mask):
                mask &= grammar.ends  # it may end here, and what begins now might not
            return
        spare = left - (len(way) + 1)
        if spare > grammar.jump:
            # a token can take one from `left` and add `jump` to the way
            self._unhurried = (spare - grammar.jump) // (grammar.jump + 1)
            return
        if spare > 0 and grammar.ways.in_text(mask):
            mask &= grammar.ways.plain
        else:
            mask[:] = 0
        mask |= grammar.ways.mask_of(way[:1])

    def _way_out(self) -> list[int] | None:
        """The one found before, as long as it is one: to walk it takes a hundredth of what it takes to find it."""
        if self._way:
            walk = self._matcher.deep_copy()
            if walk.consume_tokens(self._way) and walk.is_accepting():
                return self._way
        return self._grammar.ways.find(self._matcher)

    def _error(self) -> RequestFailedError:
        return RequestFailedError(f"the grammar could not go on: {Grammar._reason(self._matcher)}")


def _source(params: StructuredOutputsParams) -> str:
    """In the library's form."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if params.json_object:
        return str(LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON))
    if params.json is not None:
        try:
            return str(LLMatcher.grammar_from_json_schema(str(params.json), overrides=_JSON))
        except ValueError as error:  # nested too deeply
            raise RequestError(f"the schema cannot be read: {str(error)[:300]}", "structured_outputs") from error
    if params.regex is not None:
        return str(LLMatcher.grammar_from_regex(params.regex))
    if params.choice is not None:
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in params.choice)))
    text = params.grammar or ""
    try:
        return str(LLMatcher.grammar_from_lark(gbnf_to_lark(text) if "::=" in text else text))
    except Exception as error:  # the converter raises many kinds
        raise RequestError(f"the grammar cannot be read: {str(error)[:300]}", "structured_outputs") from error


def _schemas(params: StructuredOutputsParams) -> Iterator[Mapping[str, Any]]:
    """The JSON schemas in a request's grammar: its own, or those of its `%json` blocks."""
    if params.json is not None:
        yield json.loads(str(params.json))
    for block in (params.grammar or "").split("%json")[1:]:
        try:
            schema, _ = json.JSONDecoder().raw_decode(block.lstrip())
        except ValueError:
            continue
        if isinstance(schema, Mapping):
            yield schema


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, schema) of everything inside a schema that is a value by itself, with the definitions it refers to. Not of
    the schema itself, which begins but once."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    todo: list[tuple[str, Any]] = [("", schema)]
    while todo:
        key, part = todo.pop(0)
        if not isinstance(part, Mapping):
            continue
        if part is not schema:
            yield key, {**part, **shared}
        for name in ("properties", "$defs", "definitions"):
            if isinstance(part.get(name), Mapping):
                todo += part[name].items()
        for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            if isinstance(part.get(name), Sequence):
                todo += [(key, one) for one in part[name]]
        todo += [(key, part[name]) for name in ("items", "additionalProperties") if name in part]
