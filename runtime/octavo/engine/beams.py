"""The beams of a search: which sequence goes on as what, when all of them have their candidates. Called by the
scheduler; the scores are `decode/beam.py`'s.

The beams of a request are its sequences, and each is scheduled like any other. It gets candidates instead of a token
and waits for its siblings; so they need not run in one step. When the last candidates have come, `select` says which
beams live on: a parent's first child goes on in its place, further ones are *forked* into sequences that are free.
They share the parent's blocks, the last partial one too, which is copied by whoever writes to it first.

A beam that waits needs nothing of the device. Where rows or blocks are short, those are taken from it: however small
the pool is, beams which fit one at a time come to their end one at a time.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.decode.beam import Child
from octavo.engine.draft import Draft
from octavo.engine.request import BeamEvent, Request, Sequence, TokenEvent
from octavo.errors import RequestFailedError

if TYPE_CHECKING:
    from octavo.engine.scheduler import Scheduler


@dataclass(slots=True)
class _Heir:
    """What a fork takes over from its parent."""

    tokens: list[int]
    blocks: list[int]
    keys: list[bytes]
    scheduled: int
    score: float


class Beams:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._partial: set[Request] = set()
        """Searches of which some beams have their candidates and some have not."""

    def take(self, sequence: Sequence, event: TokenEvent) -> None:
        """The candidates of one beam have come."""
        request = sequence.request
        assert sequence.beam is not None
        assert isinstance(event, BeamEvent)
        sequence.beam.candidates = event.candidates
        if any(other.beam is None or other.beam.candidates is None for other in request.beams):
            self._partial.add(request)
            return
        self._partial.discard(request)
        self._select(request)

    def tell(self, sequence: Sequence, draft: Draft) -> None:
        """A beam runs in this step: put into the plan what the device does not know of it."""
        beam, row = sequence.beam, sequence.row
        assert beam is not None
        draft.searching = True
        if beam.fork_epoch == sequence.epoch:
            beam.fork_epoch = -1
            draft.new_rows.append(self._scheduler.new_row(sequence))
            draft.new_blocks |= {(row, index): block for index, block in enumerate(sequence.blocks)}
        elif sequence.num_output:
            place = len(sequence.tokens) - 1
            draft.tokens.append((row, place, sequence.tokens[place]))

    def waiting_behind(self, sequence: Sequence) -> Sequence | None:
        """A beam on the device that waits for siblings, and whose row and blocks `sequence` may have: the last in
        order, of those after it and of its own request."""
        found = [
            beam
            for request in self._partial
            for beam in request.beams
            if beam.row >= 0 and beam.beam is not None and beam.beam.candidates is not None
            if beam.order > sequence.order or request is sequence.request
        ]
        return max(found, key=lambda beam: beam.order, default=None)

    def end(self, request: Request, event: TokenEvent) -> None:
        """End all beams, each output with an event like this one."""
        self._end_all(request)
        for index in range(request.params.choices):
            self._scheduler.emit(request, TokenEvent(index, finish_reason=event.finish_reason, error=event.error))

    # ---------------------------------------------------------------- one step of a search

    def _select(self, request: Request) -> None:
        search, beams = request.search, request.beams
        assert search is not None
        candidates = [beam.beam.candidates for beam in beams if beam.beam and beam.beam.candidates]
        children = search.select([beam.tokens[beam.num_prompt :] for beam in beams], candidates)
        self._note_time(request)
        if children:
            self._go_on(request, children)
            new = search.settled([beam.tokens[beam.num_prompt :] for beam in request.beams])
            if new:
                for index in range(request.params.choices):
                    request.metrics.output_tokens += len(new)
                    self._scheduler.emit(request, TokenEvent(index, token_ids=list(new)))
            return
        results, wanted = search.results, request.params.choices
        if len(results) < wanted:
            message = f"of {wanted} outputs only {len(results)} could be made: the request forbids too many tokens"
            self.end(request, TokenEvent(0, error=RequestFailedError(message)))
            return
        self._end_all(request)
        for index, (found, rest) in enumerate(results):
            request.metrics.output_tokens += len(rest)
            last = found.tokens[-1]
            named = found.ended and last in request.stop_token_ids and last not in request.eos_token_ids
            event = BeamEvent(
                index, token_ids=rest, finish_reason="stop" if found.ended else "length",
                stop_reason=last if named else None, cumulative_logprob=found.cumulative_logprob, score=found.score,
            )  # fmt: skip
            self._scheduler.emit(request, event)

    def _go_on(self, request: Request, children: list[Child]) -> None:
        """Give each child a sequence: its parent's, or one that is free by now."""
        parents = request.beams
        heirs: dict[int, _Heir] = {}
        places: dict[int, Sequence] = {}
        taken: set[int] = set()
        for rank, child in enumerate(children):
            parent = parents[child.parent]
            if child.parent in taken:
                heirs[rank] = self._heir(parent, child)
            else:
                taken.add(child.parent)
                places[rank] = parent
        for place, parent in enumerate(parents):
            if place not in taken:
                self._scheduler.end(parent)
        free = [sequence for sequence in request.sequences if sequence.finished]
        for rank, heir in heirs.items():
            places[rank] = free.pop()
            self._fork(places[rank], heir)
        for rank, child in enumerate(children):
            if rank not in heirs:
                places[rank].tokens.append(child.token)
            _start_step(places[rank], child.score)
        request.beams = [places[rank] for rank in range(len(children))]

    def _heir(self, parent: Sequence, child: Child) -> _Heir:
        self._scheduler.pool.hold(parent.blocks)
        tokens = [*parent.tokens, child.token]
        return _Heir(tokens, list(parent.blocks), list(parent.block_keys), parent.scheduled, child.score)

    def _fork(self, sequence: Sequence, heir: _Heir) -> None:
        """Let a free sequence live on as an heir: on the device at once if there is a row and the parent was there."""
        scheduler = self._scheduler
        sequence.finished, sequence.tokens = False, heir.tokens
        if not heir.blocks or not scheduler.free_rows:
            scheduler.pool.release(heir.blocks)
            insort(scheduler.waiting, sequence, key=lambda other: other.order)
            return
        sequence.row = scheduler.free_rows.pop()
        sequence.blocks, sequence.block_keys, sequence.scheduled = heir.blocks, heir.keys, heir.scheduled
        insort(scheduler.running, sequence, key=lambda other: other.order)
        assert sequence.beam is not None
        sequence.beam.fork_epoch = sequence.epoch

    def _end_all(self, request: Request) -> None:
        self._partial.discard(request)
        for sequence in request.sequences:
            if not sequence.finished:
                self._scheduler.end(sequence)

    def _note_time(self, request: Request) -> None:
        metrics = request.metrics
        metrics.last_token_time = self._scheduler.clock() - metrics.arrival
        if metrics.first_token_time is None:
            metrics.first_token_time = metrics.last_token_time


def _start_step(sequence: Sequence, score: float) -> None:
    """It lacks one token now, which it may compute to get its next candidates."""
    assert sequence.beam is not None
    sequence.beam.score, sequence.beam.candidates = score, None
    sequence.length = len(sequence.tokens)
    sequence.limit = sequence.length + 1
