"""What runs, as the server's process knows it: each request with all that was sent of its outputs. From it a new
engine's process goes on where the old one ended, without a gap and without a repeated token, because a token depends on
its request's seed, its place and the tokens before it alone. A search is run anew instead, and what comes again is
compared and dropped.

Where processes end one after the other, it also finds out whose fault it is (`strike`). Knows no process; one lock
around all of it is its user's (`service.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from octavo.engine.child.messages import Embed, Event, Generate, Started
from octavo.engine.embed_request import EmbedEvent, EmbedRequest
from octavo.engine.request import BeamEvent, Made, Request, TokenEvent
from octavo.errors import RequestFailedError

SUSPECT = 2
"""Processes that ended one after the other while a request ran and brought nothing: from then on it is tried alone."""

Work = Request | EmbedRequest


@dataclass(frozen=True, slots=True)
class Delivery:
    """Hands an event, or several, to the caller of `work`. To be called without the lock, as it may come back here."""

    work: Work
    run: Callable[[], None]



@dataclass(slots=True)
class Entry:
    """An open request."""

    number: int
    work: Work
    made: list[Made]
    replayed: list[int]
    """Of a search that was begun anew: how much of each output has come again."""
    strikes: int = 0
    sent: bool = False
    """The process that runs now has it."""
    started: bool = False
    """It has had its first step, in this process or another."""


@dataclass(slots=True)
class Values:
    """An embedding that came by a message."""

    values: list[float]

    def tolist(self) -> list[float]:
        return self.values


@dataclass
class Ledger:
    entries: dict[int, Entry] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    """By the `id` of a work."""
    _last: int = 0
    waiting: int = 0
    """Requests without a first step: what the bound of the queue counts."""

    def open(self, work: Work) -> Entry:
        """A request comes."""
        self._last += 1
        choices = work.params.choices if isinstance(work, Request) else 1
        entry = Entry(self._last, work, [Made() for _ in range(choices)], [0] * choices)
        self.entries[entry.number] = entry
        self._numbers[id(work)] = entry.number
        self.waiting += 1
        return entry

    def find(self, work: Work) -> Entry | None:
        """Of an open request."""
        return self.entries.get(self._numbers.get(id(work), 0))

    # ---------------------------------------------------------------- what comes from the process

    def start(self, started: Started) -> None:
        entry = self.entries.get(started.number)
        if entry is not None and not entry.started:
            self._leave_queue(entry)
            entry.work.metrics.queue_time = started.queue_time
            entry.work.metrics.cached_tokens = started.cached_tokens

    def take(self, event: Event) -> Delivery | None:
        """Note an event; what is new of it is for the caller. None: nothing is."""
        entry = self.entries.get(event.number)
        if entry is None or (event.index < len(entry.made) and entry.made[event.index].ended):
            return None  # it was aborted, or ended by an error, meanwhile
        entry.strikes = 0
        if isinstance(entry.work, EmbedRequest):
            error = None if event.error is None else event.error.error()
            vector = None if event.vector is None else Values(event.vector)
            text = entry.work
            self._close(entry)
            return Delivery(text, lambda: text.end(EmbedEvent(vector, error)))
        return self._take_tokens(entry, entry.work, event)

    def _take_tokens(self, entry: Entry, request: Request, event: Event) -> Delivery | None:
        made = entry.made[event.index]
        token_ids = event.token_ids
        if request.search is not None:
            done = entry.replayed[event.index]
            again = token_ids[: len(made.token_ids) - done]
            if again != made.token_ids[done : done + len(again)]:
                return self.fail(entry, RequestFailedError(
                    "the engine's process was replaced, and the search did not find the same outputs again"
                ))  # fmt: skip
            entry.replayed[event.index] += len(token_ids)
            token_ids = token_ids[len(again) :]
        self._note(request, len(token_ids), event.preemptions)
        made.token_ids += token_ids
        made.prompt_logprobs += len(event.prompt_logprobs or ())
        made.ended = event.finish_reason is not None or event.error is not None
        if not (token_ids or event.prompt_logprobs or made.ended):
            return None
        error = None if event.error is None else event.error.error()
        kind: Any = TokenEvent if event.beam is None else BeamEvent
        found: TokenEvent = kind(
            event.index, token_ids=token_ids, logprobs=event.logprobs, prompt_logprobs=event.prompt_logprobs,
            finish_reason=event.finish_reason, stop_reason=event.stop_reason, error=error,
        )  # fmt: skip
        if event.beam is not None and isinstance(found, BeamEvent):
            found.cumulative_logprob, found.score = event.beam.cumulative_logprob, event.beam.score
        self._close_if_ended(entry)
        return Delivery(request, lambda: request.sink(found))

    @staticmethod
    def _note(request: Request, tokens: int, preemptions: int) -> None:
        metrics = request.metrics
        metrics.preemptions = preemptions
        if tokens:
            metrics.output_tokens += tokens
            metrics.last_token_time = time.monotonic() - metrics.arrival
            if metrics.first_token_time is None:
                metrics.first_token_time = metrics.last_token_time

    # ---------------------------------------------------------------- ends

    def abort(self, work: Work, index: int | None) -> tuple[Entry, list[Delivery]] | None:
        """End a request, or one of its outputs, for its caller at once. None: it has ended."""
        entry = self.find(work)
        if entry is None:
            return None
        if isinstance(work, EmbedRequest):
            self._close(entry)
            return entry, [Delivery(work, lambda: work.end(EmbedEvent()))]
        if work.search is not None:
            index = None  # a search ends as a whole
        found: list[Delivery] = []
        for place, made in enumerate(entry.made):
            if index in (None, place) and not made.ended:
                made.ended = True
                found.append(self._sending(work, TokenEvent(place, finish_reason="abort")))
        self._close_if_ended(entry)
        return entry, found

    def fail(self, entry: Entry, error: BaseException) -> Delivery:
        """End a request with an error."""
        self._close(entry, keep_unfinished=True)
        work = entry.work
        if isinstance(work, EmbedRequest):
            return Delivery(work, lambda: work.fail(error))
        places = [place for place, made in enumerate(entry.made) if not made.ended]
        for sequence in work.sequences:
            sequence.finished = True

        def deliver() -> None:
            for place in places:
                work.sink(TokenEvent(place, error=error))

        return Delivery(work, deliver)

    @staticmethod
    def _sending(request: Request, event: TokenEvent) -> Delivery:
        return Delivery(request, lambda: request.sink(event))

    def _close_if_ended(self, entry: Entry) -> None:
        if all(made.ended for made in entry.made):
            self._close(entry)

    def _close(self, entry: Entry, *, keep_unfinished: bool = False) -> None:
        if self.entries.pop(entry.number, None) is None:
            return
        del self._numbers[id(entry.work)]
        if not entry.started:
            self._leave_queue(entry)
        if isinstance(entry.work, Request) and not keep_unfinished:
            for sequence in entry.work.sequences:
                sequence.finished = True

    def _leave_queue(self, entry: Entry) -> None:
        entry.started = True
        self.waiting -= 1

    # ---------------------------------------------------------------- where a process has ended

    def strike(self) -> Entry | None:
        """The process has ended. Every request that it had might be the reason; if it had one only, and that one was a
        suspect before, it is. Returns that one: it is to fail."""
        had = [entry for entry in list(self.entries.values()) if entry.sent]
        for entry in had:
            entry.sent, entry.replayed = False, [0] * len(entry.replayed)
            entry.strikes += 1
        return had[0] if len(had) == 1 and had[0].strikes > SUSPECT else None

    def next_to_send(self) -> list[Entry]:
        """What the process is to have now and has not. Suspects come first and alone, each until something comes of
        it."""
        entries = list(self.entries.values())  # the collector may end a stream that nobody holds, and come back here
        suspects = [entry for entry in entries if entry.strikes >= SUSPECT]
        if not suspects:
            return [entry for entry in entries if not entry.sent]
        if any(entry.sent for entry in suspects):
            return []
        return suspects[:1]

    def message(self, entry: Entry) -> Generate | Embed:
        """How the process is told of it: from where it is."""
        work = entry.work
        if isinstance(work, EmbedRequest):
            return Embed(entry.number, work.prompt_ids, work.metrics.arrival)
        begun = any(made.token_ids or made.prompt_logprobs or made.ended for made in entry.made)
        salt = work.cache_salt if work.source is None else work.source.salt
        return Generate(
            entry.number, work.prompt_ids, work.params, work.max_tokens, list(work.eos_token_ids),
            [list(word) for word in work.bad_word_ids], work.seed, work.priority, salt.decode(),
            None if work.source is None else list(work.source.ids), work.length_offset, work.metrics.arrival,
            entry.made if begun and work.search is None else None,
        )  # fmt: skip
