"""What the guard and its worker say to each other, as msgpack. What a client sent travels in it as text, which says
nothing until a job reads it."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["grammar", "schema", "template"]
Outcome = Literal["fine", "refused", "slow", "late", "large", "broken", "busy"]
"""Of a job: done; refused with a reason; it takes too much time; there was too little of a processor to tell; it takes
too much memory; it broke what it ran in; no room for it now."""


class Learn(msgspec.Struct, tag=True, frozen=True):
    """Make ready for grammars of a model, known as `model` from now on."""

    model: int
    backend: str
    """The tokenizer, as the `tokenizers` library writes it."""
    named: dict[str, str]
    """Its special tokens that have a role."""
    vocab_size: int
    ends: list[int]


class Forget(msgspec.Struct, tag=True, frozen=True):
    """A model is gone."""

    model: int


class Job(msgspec.Struct, tag=True, frozen=True):
    """Something of a client's to be done. `body`: JSON, by `kind` (see `guard_jobs`)."""

    number: int
    kind: Kind
    model: int
    body: str


class Answer(msgspec.Struct, frozen=True):
    """What became of a job. `text`: the reason, or what a template wrote."""

    number: int
    outcome: Outcome
    text: str = ""
    field: str | None = None


ToWorker = Learn | Forget | Job


def encode(message: ToWorker | Answer) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_order(data: bytes) -> ToWorker:
    found: ToWorker = msgspec.msgpack.decode(data, type=Learn | Forget | Job)
    return found


def decode_answer(data: bytes) -> Answer:
    return msgspec.msgpack.decode(data, type=Answer)
