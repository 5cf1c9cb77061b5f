"""Grammars, approved by the guard before anybody else compiles them.

`Verdicts` asks and remembers. `GuardedGrammars` is used where a `Grammars` is, in a process whose engine is another
one: it compiles nothing unless it is told to.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from octavo.errors import QueueFullError, RequestError
from octavo.processes.guard import Guard
from octavo.processes.guard_messages import Answer, Kind

if TYPE_CHECKING:
    from octavo.decode.grammar import Grammar, Grammars
    from octavo.structured_outputs import StructuredOutputsParams
    from octavo.tokenizer import Tokenizer

logger = logging.getLogger("octavo.guard")

KEPT = 4096
"""Verdicts that are remembered: each a digest, and a reason."""
FIELD = "structured_outputs"
_Key = tuple[Kind, bytes]
_SMALLER = "make it smaller (fewer alternatives, repetitions, properties and levels)"
_WHY = {
    "slow": f"takes too long to compile: {_SMALLER}",
    "large": f"takes too much memory to compile: {_SMALLER}",
}
_BROKEN = f"is more than the compiler can take: {_SMALLER}"


class Verdicts:
    """Of one model. Any thread may ask; those who ask the same wait for one answer."""

    def __init__(self, guard: Guard, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._guard = guard
        self._model = guard.learn(tokenizer, vocab_size, eos_token_ids)
        self._known: OrderedDict[_Key, str] = OrderedDict()
        self._asked: dict[_Key, Future[str]] = {}
        self._lock = threading.Lock()

    def known(self, params: StructuredOutputsParams) -> bool:
        """`check` will not take time."""
        with self._lock:
            return _key("grammar", _text(params)) in self._known

    def check(self, params: StructuredOutputsParams) -> None:
        """Blocks until there is a verdict. Raises `RequestError` for a grammar that cannot be had, and
        `QueueFullError` where too many wait for the guard."""
        _raise(self._ask("grammar", _text(params)).result())

    async def approve(self, params: StructuredOutputsParams) -> None:
        """`check` for asyncio: no thread waits."""
        _raise(await asyncio.wrap_future(self._ask("grammar", _text(params))))

    async def reason(self, schema: str) -> str:
        """Why the library does not support a JSON schema (as text); empty if it does, which is no approval."""
        return await asyncio.wrap_future(self._ask("schema", schema))

    def close(self) -> None:
        """The model is gone."""
        self._guard.forget(self._model)

    def _ask(self, kind: Kind, text: str) -> Future[str]:
        """Of the reason; empty if there is none."""
        key = _key(kind, text)
        with self._lock:
            found = self._asked.get(key)
            if found is not None:
                return found
            answer: Future[str] = Future()
            answer.set_running_or_notify_cancel()
            reason = self._known.get(key)
            if reason is not None:
                self._known.move_to_end(key)
                answer.set_result(reason)
                return answer
            job = self._guard.ask(kind, text, self._model)
            self._asked[key] = answer
        job.add_done_callback(lambda done: self._take(key, answer, done))
        return answer

    def _take(self, key: _Key, answer: Future[str], done: Future[Answer]) -> None:
        """On the guard's thread."""
        error = done.exception()
        outcome = "" if error is not None else done.result().outcome
        reason = "" if error is not None else _reason(key[0], done.result())
        with self._lock:
            del self._asked[key]
            if outcome not in ("", "busy", "late"):  # these say nothing of another time
                self._known[key] = reason
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
        if error is not None:
            answer.set_exception(error)
        elif outcome in ("busy", "late"):
            answer.set_exception(QueueFullError("too many grammars wait already"))
        else:
            answer.set_result(reason)


@dataclass(frozen=True)
class Approved:
    """What `GuardedGrammars` without an inner one gives for a grammar: the engine's process compiles it by itself."""

    params: StructuredOutputsParams

    def start(self) -> Approved:
        return self


class GuardedGrammars:
    """The interface of `Grammars`, whose `compile` asks the guard first. `inner`: compiles what was approved, in this
    process; None: somebody else does."""

    def __init__(self, verdicts: Verdicts, inner: Grammars | None = None) -> None:
        self._verdicts, self._inner = verdicts, inner

    def known(self, params: StructuredOutputsParams) -> bool:
        """`compile` will not take time."""
        return self._verdicts.known(params) and (self._inner is None or self._inner.known(params))

    def compile(self, params: StructuredOutputsParams) -> Grammar | Approved:
        """Blocks; its `start()` makes what a request is constrained by. Raises `RequestError` with the field
        "structured_outputs", or `QueueFullError`."""
        self._verdicts.check(params)
        return Approved(params) if self._inner is None else self._inner.compile(params)


def _text(params: StructuredOutputsParams) -> str:
    return json.dumps({name: value for name, value in asdict(params).items() if value is not None})


def _key(kind: Kind, text: str) -> _Key:
    return kind, hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _raise(reason: str) -> None:
    if reason:
        raise RequestError(reason, FIELD)


def _reason(kind: Kind, answer: Answer) -> str:
    if answer.outcome in ("fine", "refused"):
        return answer.text
    logger.warning("a %s was refused: %s %s", kind, answer.outcome, answer.text)
    return f"{'the grammar' if kind == 'grammar' else 'it'} {_WHY.get(answer.outcome, _BROKEN)}"
