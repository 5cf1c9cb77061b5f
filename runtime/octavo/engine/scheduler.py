"""Who runs in this step, with how many tokens. The only place that moves sequences and blocks. Knows no torch.

One rule, no phases: each step gives each running sequence as many tokens as it lacks (`length - scheduled`), within a
token budget; running sequences first, then waiting ones, both in the order (priority, arrival, index). Chunked prefill,
prefix-cache hits, decoding and resumption after a preemption all follow from it. When blocks run out, the last in order
is preempted: it gives back its blocks and its row and waits; what it computed is mostly still cached when it resumes.

Termination: the first sequence in order can preempt all others and alone fits into the pool (the service refuses what
does not), so it always advances.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from typing import TYPE_CHECKING

from octavo.engine.beams import Beams
from octavo.engine.blocks import NULL_BLOCK, BlockPool
from octavo.engine.coming import ComingBlocks
from octavo.engine.draft import Draft
from octavo.engine.plan import NewRow, RowStep
from octavo.engine.request import Request, Sequence, TokenEvent
from octavo.engine.siblings import donor_of, sibling_prefills
from octavo.engine.source import SourceBlocks, place_of

if TYPE_CHECKING:
    import numpy as np


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order


class Scheduler:
    """Token-budget scheduler over a `BlockPool`, with `max_num_seqs` device rows."""

    def __init__(
        self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int, clock: Callable[[], float]
    ) -> None:
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.suspects: list[Sequence] = []
        self.preemptions = 0
        self.fresh = 0
        """Requests that wait for their very first step: what the bound of the queue counts."""
        self.clock = clock
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._arrivals = 0
        self._scrub: dict[int, int] = {}
        self._coming = ComingBlocks(pool)
        self.sources = SourceBlocks(pool, max_num_batched_tokens)
        self._beams = Beams(self)

    # ---------------------------------------------------------------- intake

    def add(self, request: Request) -> None:
        """Queue all sequences of a request that have not ended before; of a search the one that begins."""
        self._arrivals += 1
        self.fresh += 1
        request.arrival = self._arrivals
        for sequence in request.beams or request.sequences:
            if not sequence.finished:
                insort(self.waiting, sequence, key=_order)

    def abort(self, request: Request, index: int | None = None) -> None:
        """End a request (or one of its sequences) now: its blocks are free at once, its last event says "abort"."""
        if request.beams:
            if not request.finished:
                self._beams.end(request, TokenEvent(0, finish_reason="abort"))
            return
        for sequence in request.sequences:
            if index in (None, sequence.index) and not sequence.finished:
                self.end(sequence)
                self.emit(sequence.request, TokenEvent(sequence.index, finish_reason="abort"))

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    # ---------------------------------------------------------------- planning

    def plan(self) -> Draft | None:
        """Decide the next step; None if there is nothing to run (all are done, or wait for tokens under way)."""
        draft = Draft(copies=dict(self._scrub))
        budget = self.max_num_batched_tokens
        if self.suspects:
            self._plan_alone(self.suspects[0], draft, budget)
        else:
            for sequence in list(self.running):
                if budget > 0 and sequence.row >= 0:
                    budget -= self._advance(sequence, draft, budget)
            if not draft.preempted:
                self._admit_waiting(draft, budget)
        if not draft.parts:
            return None
        self._scrub.clear()
        # decoding rows first: attention back ends split a step into single tokens and longer chunks
        draft.parts.sort(key=lambda part: part[2].count > 1)
        if len(draft.parts) > 1 and draft.parts[-1][2].count == 1:
            draft.shared_blocks = self.pool.shared_by(draft.parts[0][0].blocks, len(self.running))
        return draft

    def _advance(self, sequence: Sequence, draft: Draft, budget: int) -> int:
        """Give a running sequence what it lacks; returns the tokens spent (0 if it was preempted or lacks nothing)."""
        count = min(sequence.length - sequence.scheduled, budget) if sequence.length < sequence.limit else 0
        if count > 0 and self._make_room(sequence, sequence.scheduled + count, draft):
            self._extend(sequence, count, draft)
            return count
        return 0

    def _admit_waiting(self, draft: Draft, budget: int) -> None:
        position = 0
        while budget > 0 and position < len(self.waiting):
            sequence = self.waiting[position]
            if sequence.samples_pending or sibling_prefills(sequence, draft) or self._prefix_comes(sequence):
                position += 1  # ready in a later step; those behind need not wait for it
                continue
            spent = self._admit(sequence, draft, budget)
            if not spent:
                return  # first come, first served: nobody overtakes one that waits for blocks
            budget -= spent

    def _admit(self, sequence: Sequence, draft: Draft, budget: int) -> int:
        """Move a waiting sequence to a device row, reusing what is computed already; returns the tokens spent, 0 if no
        room."""
        pool = self.pool
        if not self.free_rows and not self._make_way(sequence, draft):
            return 0
        donor = donor_of(sequence, draft)
        if donor is not None:
            # fork: share the prompt's blocks, compute only its last token again (that write copies the last block)
            computed = sequence.num_prompt - 1
            blocks, keys = (
                donor.blocks[: self._blocks_for(sequence.num_prompt)],
                donor.block_keys[: computed // pool.block_size],
            )
        elif self._reports_prompt(sequence):
            computed, blocks, keys = 0, [], []  # every prompt position must run
        else:
            blocks, keys = pool.match(sequence.tokens, sequence.request.cache_salt, sequence.length - 1)
            computed = len(blocks) * pool.block_size
        wanted = self._blocks_for(sequence.length) - len(blocks) + (donor is not None)
        while True:  # one that makes way may have been the last to hold the source
            source = self.sources.missing(sequence.request, draft)
            if source is None:
                return 0
            if wanted + source + sum(map(pool.is_idle, blocks)) <= pool.available:
                break
            if not self._make_way(sequence, draft):
                return 0
        pool.hold(blocks)
        source_cached = self.sources.take(sequence.request, draft)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_order)
        sequence.row = self.free_rows.pop()
        sequence.blocks, sequence.block_keys, sequence.scheduled = list(blocks), list(keys), computed
        metrics = sequence.request.metrics
        if metrics.queue_time is None:
            self.fresh -= 1
            metrics.queue_time = self.clock() - metrics.arrival
            metrics.cached_tokens = computed + (metrics.prompt_tokens - sequence.num_prompt) * source_cached
        self._coming.announce(sequence)
        draft.new_rows.append(self.new_row(sequence))
        draft.new_blocks |= {(sequence.row, index): block for index, block in enumerate(blocks)}
        count = min(sequence.length - computed, budget)
        if not self._make_room(sequence, computed + count, draft):
            raise RuntimeError("an admitted sequence found no room")  # `wanted` above was counted wrongly
        self._extend(sequence, count, draft)
        return count

    def _plan_alone(self, sequence: Sequence, draft: Draft, budget: int) -> None:
        """A step for one suspect only; others are preempted if it needs their blocks."""
        if sequence.row >= 0:
            self._advance(sequence, draft, budget)
            return
        if sequence.samples_pending:
            return
        while not self.free_rows or not self._admit(sequence, draft, budget):
            self._preempt(self.running[-1], draft)

    def _make_room(self, sequence: Sequence, tokens: int, draft: Draft) -> bool:
        """Blocks for the first `tokens` tokens, writable from `scheduled` on. Preempts from the end of the order; False
        if the sequence itself had to go."""
        pool = self.pool
        first = sequence.scheduled // pool.block_size
        while True:
            copies = first < len(sequence.blocks) and pool.is_shared(sequence.blocks[first])
            missing = self._blocks_for(tokens) - len(sequence.blocks)
            if max(missing, 0) + copies <= pool.available:
                break
            if self._make_way(sequence, draft):
                continue
            victim = self.running[-1]
            self._preempt(victim, draft)
            if victim is sequence:
                return False
        if copies:
            source = sequence.blocks[first]
            block = (pool.allocate(1) or [NULL_BLOCK])[0]
            pool.release([source])
            sequence.blocks[first] = block
            draft.copies[block] = source
            draft.new_blocks[sequence.row, first] = block
        for block in pool.allocate(max(missing, 0)) or ():
            draft.new_blocks[sequence.row, len(sequence.blocks)] = block
            sequence.blocks.append(block)
        return True

    def _extend(self, sequence: Sequence, count: int, draft: Draft) -> None:
        samples = sequence.scheduled + count == sequence.length
        wants = sequence.request.params.prompt_logprobs
        reports = self._reports_prompt(sequence) and sequence.scheduled < sequence.num_prompt - 1
        step = RowStep(sequence.row, sequence.scheduled, count, samples, wants if reports else None)
        draft.parts.append((sequence, sequence.epoch, step))
        sequence.scheduled += count
        sequence.length += samples
        if sequence.beam is not None:
            self._beams.tell(sequence, draft)

    def _make_way(self, sequence: Sequence, draft: Draft) -> bool:
        """Preempt a beam that needs nothing at the moment, for one that does. False if there is none."""
        victim = self._beams.waiting_behind(sequence)
        if victim is not None:
            self._preempt(victim, draft)
        return victim is not None

    def _preempt(self, sequence: Sequence, draft: Draft) -> None:
        self._leave_device(sequence)
        insort(self.waiting, sequence, key=_order)
        sequence.request.metrics.preemptions += 1
        self.preemptions += 1
        draft.preempted = True

    # ---------------------------------------------------------------- results

    def launched(self, draft: Draft) -> None:
        """A step is under way: name the blocks that it fills with a prompt while the device works on them. Those of
        8000 tokens take a millisecond, after which the answer would wait."""
        for sequence, _, step in draft.parts:
            if step.count > self.pool.block_size:
                self._coming.name(sequence, step.start + step.count)

    def masks(self, draft: Draft) -> list[np.ndarray | None]:
        """Which tokens the sequences of a step may make, once all earlier steps are committed. None for one that ended
        meanwhile: whatever it makes is dropped."""
        masks: list[np.ndarray | None] = []
        for place in draft.masked():
            sequence, mask = draft.parts[place][0], None
            if sequence.constraint is not None and not sequence.finished:
                try:
                    mask = sequence.constraint.allowed(sequence.request.max_tokens - sequence.num_output)
                except Exception as error:
                    self.fail(sequence, error)
            masks.append(mask)
        return masks

    def commit(self, draft: Draft, events: list[TokenEvent | None]) -> None:
        """Take in what a step produced. `events[i]` belongs to `draft.parts[i]`: its tokens and log-probabilities, or
        an error, or None if nothing was sampled. Finishes sequences, publishes full blocks, sends the events on."""
        for (sequence, epoch, step), event in zip(draft.parts, events, strict=True):
            if sequence.finished:
                continue  # aborted or ended after the launch: the surplus token is dropped
            if event is not None and event.error is not None:
                self.fail(sequence, event.error)
                continue
            if epoch == sequence.epoch:
                self.sources.publish(sequence.request)
                self._publish(sequence, step.start + step.count)
                if sequence in self.suspects and step.start + step.count >= sequence.alone_until:
                    self.suspects.remove(sequence)
            if event is not None:
                if sequence.beam is None:
                    self._take(sequence, step, event)
                else:
                    self._beams.take(sequence, event)

    def rollback(self, draft: Draft) -> list[Sequence]:
        """Undo a step that did not run to its end: its sequences wait again, to compute anew. Returns those still
        alive."""
        alive = []
        size = self.pool.block_size
        self._scrub |= {block: NULL_BLOCK for source in draft.sources for block in source.blocks}
        for sequence, epoch, step in draft.parts:
            if sequence.finished:
                continue
            sequence.length -= step.samples
            if epoch == sequence.epoch:
                written = [b for b in sequence.blocks[step.start // size :] if not self.pool.is_shared(b)]
                self._scrub |= dict.fromkeys(written, NULL_BLOCK)
                self._leave_device(sequence)
                insort(self.waiting, sequence, key=_order)
            alive.append(sequence)
        self._scrub |= {block: source for block, source in draft.copies.items() if source == NULL_BLOCK}
        return alive

    def isolate(self, draft: Draft) -> None:
        """A step of several sequences failed: let each run alone up to where it was, so that the guilty one fails
        alone."""
        ends = {id(sequence): step.start + step.count for sequence, _, step in draft.parts}
        for sequence in self.rollback(draft):
            sequence.alone_until = ends[id(sequence)]
            if sequence not in self.suspects:
                self.suspects.append(sequence)

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """End one sequence with an error, or the search of which it is a beam. What was written is not trusted: nobody
        can find it, and zeros go over it, because a NaN in a stale slot would survive the mask of the next owner
        (0 * NaN)."""
        written = [block for each in sequence.request.beams or [sequence] for block in each.blocks]
        own = [block for block in written if not self.pool.is_shared(block)]
        own += self.sources.alone(sequence.request)
        self.pool.discard(own)
        self._scrub |= dict.fromkeys(own, NULL_BLOCK)
        if sequence.beam is not None:
            self._beams.end(sequence.request, TokenEvent(0, error=error))
            return
        self.end(sequence)
        self.emit(sequence.request, TokenEvent(sequence.index, error=error))

    def _take(self, sequence: Sequence, step: RowStep, event: TokenEvent) -> None:
        request, metrics = sequence.request, sequence.request.metrics
        if event.prompt_logprobs is not None:
            known = max(0, sequence.prompt_logprobs_sent - step.start)  # computed again after a preemption
            event.prompt_logprobs = event.prompt_logprobs[known:]
            sequence.prompt_logprobs_sent += len(event.prompt_logprobs)
        if event.token_ids:
            now = self.clock() - metrics.arrival
            metrics.first_token_time = now if metrics.first_token_time is None else metrics.first_token_time
            metrics.last_token_time = now
            metrics.output_tokens += len(event.token_ids)
            sequence.tokens.extend(event.token_ids)
            token = event.token_ids[-1]
            if sequence.num_output >= request.params.min_tokens:
                if token in request.eos_token_ids:
                    event.finish_reason = "stop"
                elif token in request.stop_token_ids:
                    event.finish_reason, event.stop_reason = "stop", token
            if event.finish_reason is None and sequence.constraint is not None:
                try:
                    event.finish_reason = "stop" if sequence.constraint.accept(token) else None
                except Exception as error:
                    self.fail(sequence, error)
                    return
            if event.finish_reason is None and sequence.num_output >= request.max_tokens:
                event.finish_reason = "length"
        event.index = sequence.index
        if event.finish_reason is not None:
            self.end(sequence)
        if event.token_ids or event.prompt_logprobs:
            self.emit(sequence.request, event)

    # ---------------------------------------------------------------- helpers

    def _publish(self, sequence: Sequence, computed: int) -> None:
        size, keys = self.pool.block_size, sequence.block_keys
        for index in range(len(keys), computed // size):
            tokens = sequence.tokens[index * size : (index + 1) * size]
            parent = keys[-1] if keys else b""
            key = sequence.named.pop(0) if sequence.named else None
            keys.append(self.pool.publish(sequence.blocks[index], parent, tokens, sequence.request.cache_salt, key))
        if sequence.coming_key:
            self._coming.announce(sequence)

    def end(self, sequence: Sequence) -> None:
        sequence.finished = True
        if sequence.row >= 0:
            self._leave_device(sequence)
        else:
            self.waiting.remove(sequence)
        never_ran = sequence.request.metrics.queue_time is None
        if never_ran and all(other.finished for other in sequence.request.sequences):
            self.fresh -= 1
        if sequence in self.suspects:
            self.suspects.remove(sequence)

    def _leave_device(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._coming.withdraw(sequence)
        self.pool.release(sequence.blocks)
        self.free_rows.append(sequence.row)
        sequence.blocks, sequence.block_keys, sequence.named, sequence.scheduled, sequence.row = [], [], [], 0, -1
        self.sources.leave(sequence.request)
        sequence.epoch += 1

    def emit(self, request: Request, event: TokenEvent) -> None:
        try:
            request.sink(event)
        except Exception:  # the caller is gone (a closed event loop): nobody waits for the rest
            for other in request.sequences:
                if not other.finished:
                    self.end(other)

    def new_row(self, sequence: Sequence) -> NewRow:
        request = sequence.request
        stop_ids = tuple(request.eos_token_ids | request.stop_token_ids)
        seed = (request.seed + 0x9E3779B97F4A7C15 * sequence.index) % 2**64
        return NewRow(
            sequence.row, list(sequence.tokens), sequence.num_prompt, request.params, seed - 2**64 if seed >= 2**63 else
            seed, request.wants_logprobs, stop_ids, request.bad_word_ids, place_of(request),
        )  # fmt: skip

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def _reports_prompt(self, sequence: Sequence) -> bool:
        """Prompt log-probabilities come from the first sequence, and only until all were sent."""
        wants = sequence.request.params.prompt_logprobs is not None and sequence.index == 0
        return wants and sequence.prompt_logprobs_sent < sequence.num_prompt - 1

    def _prefix_comes(self, sequence: Sequence) -> bool:
        """Another request's sequence is computing what this one would compute first: wait, and share its blocks."""
        forks = sequence.index > 0 and not sequence.num_output
        return not forks and not self._reports_prompt(sequence) and self._coming.would_help(sequence)
