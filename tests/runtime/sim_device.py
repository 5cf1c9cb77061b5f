"""A device of plain Python for the scheduler: an oracle which knows what every slot of the KV cache must hold.

A slot holds a digest of the salt and all tokens up to its own, as keys and values depend on all of them. Each step the
device checks every position of every running sequence, then makes a token out of the digests it read: a wrong block
anywhere changes the tokens, and the test compares these with `expected_tokens`, which knows no blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.decode.beam import BeamSearch, Candidates
from octavo.engine.plan import Masks, SearchedStep, StepPlan
from octavo.engine.request import BeamEvent, Request, Sequence, TokenEvent
from octavo.engine.scheduler import Scheduler
from octavo.errors import RequestFailedError

NAN = "nan"
POISON = 99
"""A prompt token which makes keys, values and the sampled token NaN."""
VOCABULARY = 50
EOS = 7


def digest(parent: int, token: int) -> int:
    return hash((parent, token, 0x0C7A)) & 0xFFFFFFFF


def root(salt: bytes) -> int:
    return int.from_bytes(salt, "big") + 1


def next_token(state: int, seed: int) -> int:
    return hash((state, seed)) % VOCABULARY


def expected_tokens(request: Request, seed: int) -> tuple[list[int], str]:
    """Output and finish reason of a sequence, by the definition."""
    state = root(request.cache_salt)
    for token in request.prompt_ids:
        state = digest(state, token)
    made: list[int] = []
    while True:
        made.append(next_token(state, seed))
        state = digest(state, made[-1])
        if made[-1] in request.eos_token_ids and len(made) >= request.params.min_tokens:
            return made, "stop"
        if len(made) == request.max_tokens:
            return made, "length"


def next_candidates(state: int, score: float, keep: int) -> Candidates:
    """Log-probabilities are multiples of 1/64, so that their sums are exact; the end is likely."""
    sixtyfourths = [-(hash((state, token)) % 640) // (3 if token == EOS else 1) for token in range(VOCABULARY)]
    best = sorted((-score - some / 64, token) for token, some in enumerate(sixtyfourths))[:keep]
    return Candidates([token for _, token in best], [-negative for negative, _ in best])


def expected_search(request: Request) -> list[tuple[list[int], str]]:
    """Outputs and finish reasons of a beam search, by the definition: it knows no blocks, and no steps but its own."""
    params = request.params
    search = BeamSearch(
        params.width, returned=params.n, ends=request.eos_token_ids, max_tokens=request.max_tokens,
        length_penalty=params.length_penalty, early_stopping=params.early_stopping,
    )  # fmt: skip
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    while not search.done:
        found = []
        for tokens, score in beams:
            state = root(request.cache_salt)
            for token in [*request.prompt_ids, *tokens]:
                state = digest(state, token)
            found.append(next_candidates(state, score, search.keep))
        children = search.select([tokens for tokens, _ in beams], found)
        beams = [([*beams[child.parent][0], child.token], child.score) for child in children]
    return [(found.tokens, "stop" if found.ended else "length") for found in search.finished[: params.n]]


@dataclass
class _Row:
    tokens: list[int]
    seed: int
    salt: bytes
    table: dict[int, int] = field(default_factory=dict)


def _untold(sequence: Sequence) -> bool:
    """It was forked, and the device does not know of it yet: what stands in its row is another one's."""
    return sequence.beam is not None and sequence.beam.fork_epoch == sequence.epoch


@dataclass
class _Done:
    events: list[TokenEvent | None]
    error: Exception | None

    def wait(self) -> list[TokenEvent | None]:
        if self.error is not None:
            raise self.error
        return self.events


class SimDevice:
    """A `StepRunner`. `stale_matters`: like the CPU's attention, which runs without overlap, it reads whole blocks, so
    a NaN behind a sequence's end would survive the mask; a GPU's kernel does not read there.
    `fail_launch` and `fail_wait` make the next step fail at that point, after it wrote garbage."""

    def __init__(self, scheduler: Scheduler, *, stale_matters: bool) -> None:
        self.scheduler, self.stale_matters = scheduler, stale_matters
        self.size = scheduler.pool.block_size
        self.slots: list[list[int | str | None]] = [[None] * self.size for _ in range(scheduler.pool.num_blocks)]
        self.rows: dict[int, _Row] = {}
        self.fail_launch = self.fail_wait = False
        self.poisons = {POISON}
        self.raise_on: int | None = None
        """A token id: every step that computes it raises."""
        self.steps = self.copied = self.most_used = 0
        self.shared_most = 0
        """The most blocks that some step's sequences had in common, times the others of them."""

    def launch(self, plan: StepPlan, masks: Masks) -> _Done:
        self.steps += 1
        self._check_plan(plan)
        self._apply(plan)
        self._check_sharing(plan)
        raising = any(self.raise_on in self._inputs(step.row, step.start, step.count) for step in plan.steps)
        fail_launch, fail_wait = self.fail_launch or raising, self.fail_wait
        self.fail_launch = self.fail_wait = False
        for step in plan.steps:  # every key is written before any query reads, as in a layer
            self._write(step.row, step.start, step.count, broken=fail_launch or fail_wait)
        if fail_launch:
            raise RuntimeError("the device failed")
        if fail_wait:
            for step in plan.steps:
                if step.samples:
                    self.rows[step.row].tokens.append(-1)
            return _Done([], RuntimeError("the device failed late"))
        searched = {step.entry: step for step in plan.searched}
        events = [
            self._read(step.row, step.start + step.count, step.samples, searched.get(entry))
            for entry, step in enumerate(plan.steps)
        ]
        return _Done(events, None)

    def _inputs(self, row: int, start: int, count: int) -> list[int]:
        return self.rows[row].tokens[start : start + count]

    def _check_plan(self, plan: StepPlan) -> None:
        rows = [step.row for step in plan.steps]
        assert len(set(rows)) == len(rows), "a row runs twice in one step"
        assert 0 < plan.num_tokens <= self.scheduler.max_num_batched_tokens, "the budget is exceeded, or the step empty"
        assert all(step.count > 0 for step in plan.steps)
        counts = [step.count > 1 for step in plan.steps]
        assert counts == sorted(counts), "decoding rows must come first"
        destinations = [destination for _, destination in plan.copies]
        assert len(set(destinations)) == len(destinations), "a block is copied onto twice"
        assert 0 not in destinations, "the null block is written"
        for number, (copied, _) in enumerate(plan.copies):
            assert copied not in destinations[:number], "a block is written before it is read"
        places = [(row, index) for row, index, _ in plan.new_blocks]
        assert len(set(places)) == len(places), "two blocks have one place: a device may apply either last"
        new_rows = [new.row for new in plan.new_rows]
        assert len(set(new_rows)) == len(new_rows), "a row is given twice"
        assert 0 not in [block for _, _, block in plan.new_blocks], "the null block is given to a sequence"

    def _check_sharing(self, plan: StepPlan) -> None:
        """What the plan says to be common is, is whole, and is written by nobody in this step."""
        if plan.shared_blocks:
            assert all(step.count == 1 for step in plan.steps)
            assert all(step.start >= plan.shared_blocks * self.size for step in plan.steps)
            common = {
                tuple(self.rows[step.row].table[index] for index in range(plan.shared_blocks)) for step in plan.steps
            }
            assert len(common) == 1
            self.shared_most = max(self.shared_most, plan.shared_blocks * (len(plan.steps) - 1))

    def _apply(self, plan: StepPlan) -> None:
        read = [(list(self.slots[source]), destination) for source, destination in plan.copies]
        for content, destination in read:
            self.slots[destination] = content
        self.copied += sum(source != 0 for source, _ in plan.copies)
        by_row = {sequence.row: sequence for sequence in self.scheduler.running}
        self.most_used = max(self.most_used, self.scheduler.pool.used)
        for new in plan.new_rows:
            salt = by_row[new.row].request.cache_salt
            self.rows[new.row] = _Row(list(new.tokens), new.seed, salt)
        for row, index, block in plan.new_blocks:
            self.rows[row].table[index] = block
        for row, position, token in plan.tokens:
            known = self.rows[row].tokens
            assert len(known) >= position, "a token comes after one that the row does not have"
            known[position:] = [token]

    def _states(self, row: _Row, end: int) -> list[int | str]:
        states: list[int | str] = []
        state: int | str = root(row.salt)
        for token in row.tokens[:end]:
            state = NAN if token in self.poisons or state == NAN else digest(int(state), token)
            states.append(state)
        return states

    def _write(self, number: int, start: int, count: int, *, broken: bool) -> None:
        row = self.rows[number]
        assert len(row.tokens) >= start + count, "a step reads tokens that the row does not have"
        states = self._states(row, start + count)
        for position in range(start, start + count):
            block = row.table[position // self.size]
            for other_number, other in self.rows.items():
                live = any(s.row == other_number and not _untold(s) for s in self.scheduler.running)
                if other_number != number and live:
                    assert block not in other.table.values(), f"block {block} is written while another row holds it"
            self.slots[block][position % self.size] = NAN if broken else states[position]

    def _read(self, number: int, end: int, samples: bool, searched: SearchedStep | None) -> TokenEvent | None:
        row = self.rows[number]
        states = self._states(row, end)
        poisoned = NAN in states
        for index in range(-(-end // self.size)):
            for offset, slot in enumerate(self.slots[row.table[index]]):
                position = index * self.size + offset
                if position < end:
                    assert slot == states[position], f"row {number} reads a wrong key at {position} of {end}"
                elif self.stale_matters:
                    assert slot != NAN or poisoned, f"row {number}: NaN in a stale slot survives the mask at {position}"
        if poisoned:
            if samples:
                row.tokens.append(0)
            return TokenEvent(0, error=RequestFailedError("the output was not finite"))
        if not samples:
            return None
        if searched is not None:
            return BeamEvent(0, candidates=next_candidates(int(states[-1]), searched.score, searched.keep))
        token = next_token(int(states[-1]), row.seed)
        del row.tokens[end:]
        row.tokens.append(token)
        return TokenEvent(0, token_ids=[token])
