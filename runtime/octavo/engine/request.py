"""A request and its sequences, as the engine sees them. Made by the service, moved through the scheduler.

A *sequence* is one of a request's outputs: the schedulable unit. Its counters tell the whole state, whether it
prefills, decodes or resumes after a preemption:

    tokens      known token ids, prompt first (a sampled token enters when its step is committed)
    length      len(tokens) plus sampled tokens that are still on the device
    scheduled   tokens whose keys and values are in the cache, or will be when the launched steps have run
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from octavo.decode.beam import BeamSearch, Candidates
from octavo.engine.source import Source
from octavo.outputs import RequestMetrics
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np


@dataclass(slots=True)
class RawLogprobs:
    """Log-probabilities of one position as the device gave them: the token's own, its rank, the most likely ids."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class TokenEvent:
    """Engine to caller: what is new in one sequence. The last event of a sequence has a `finish_reason` or an
    `error`."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[RawLogprobs] | None = None
    prompt_logprobs: list[RawLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: BaseException | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(slots=True)
class BeamEvent(TokenEvent):
    """Of a beam search."""

    candidates: Candidates | None = None
    """Device to scheduler: of one beam, instead of a token."""
    cumulative_logprob: float = 0.0
    score: float = 0.0
    """Engine to caller: of an output that ends."""


Sink = Callable[[TokenEvent], None]


@dataclass(slots=True)
class Made:
    """What was sent of one output so far."""

    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: int = 0
    ended: bool = False


class Constraint(Protocol):
    """What the engine asks of a grammar (`decode/grammar.py`): which tokens may come next in one sequence. An error of
    either call is the sequence's own."""

    def accept(self, token: int) -> bool:
        """Take in the token that was made. True: the output is complete."""

    def allowed(self, left: int) -> np.ndarray:
        """[ceil(V / 32)] int32, a bit for each token: it may come next, of `left` that may still be made."""


class Beam:
    """What a sequence is in a beam search (`beams.py` moves it)."""

    __slots__ = ("candidates", "fork_epoch", "keep", "score")

    def __init__(self, keep: int) -> None:
        self.keep = keep
        """How many candidates are wanted of it."""
        self.score = 0.0
        """Sum of the log-probabilities of its tokens."""
        self.candidates: Candidates | None = None
        """They have come, and it waits for those of its siblings: it needs nothing of the device meanwhile."""
        self.fork_epoch = -1
        """The sequence's epoch in which it became another one's fork, while the device does not know."""


class Request:
    """One prompt with its parameters; `width` sequences. `sink` receives its events on the engine's thread.

    `source_ids`: what the encoder of an encoder-decoder reads; the prompt is then how the decoder begins.

    In a beam search the sequences are beams: only those in `beams` live, best first, and the rest are finished until
    they are forked. Events are of the outputs then, `choices` of them. `length_offset`: see `BeamSearch`."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: Seq[int],
        params: SamplingParams,
        sink: Sink,
        *,
        max_tokens: int,
        eos_token_ids: Seq[int] = (),
        bad_word_ids: Seq[Seq[int]] = (),
        seed: int = 0,
        priority: int = 0,
        cache_salt: str = "",
        source_ids: Seq[int] | None = None,
        length_offset: int = 0,
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.sink = sink
        self.max_tokens = max_tokens
        self.eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        self.bad_word_ids = tuple(tuple(word) for word in bad_word_ids)
        self.seed = seed
        self.priority = priority
        self.length_offset = length_offset
        self.source = None if source_ids is None else Source(source_ids, cache_salt.encode())
        self.cache_salt = cache_salt.encode() if self.source is None else self.source.digest
        """Equal tokens with another salt have other keys and values. Those of a decoder depend on the source."""
        self.arrival = 0
        """Position in the order of arrival; the scheduler sets it."""
        self.metrics = RequestMetrics(
            arrival=time.monotonic(), prompt_tokens=len(self.prompt_ids) + len(source_ids or ())
        )
        self.sequences = [Sequence(self, index) for index in range(params.width)]
        self.search: BeamSearch | None = None
        self.beams: list[Sequence] = []
        if params.searches:
            self.search = BeamSearch(
                params.width, returned=params.n, ends=self.eos_token_ids | self.stop_token_ids, max_tokens=max_tokens,
                length_penalty=params.length_penalty, early_stopping=params.early_stopping, length_offset=length_offset,
            )  # fmt: skip
            self.beams = self.sequences[:1]
            for sequence in self.sequences:
                sequence.beam = Beam(self.search.keep)
                sequence.limit = sequence.num_prompt + 1
                sequence.finished = sequence.index > 0

    def constrain(self, start: Callable[[], Constraint]) -> None:
        """Hold each sequence to a grammar. Before the request is submitted."""
        for sequence in self.sequences:
            sequence.constraint = start()

    def resume(self, made: Seq[Made]) -> None:
        """Go on where another engine ended, each sequence with the tokens that it had. Not for a search, which begins
        anew. After `constrain`, before the request is submitted."""
        for sequence, before in zip(self.sequences, made, strict=True):
            sequence.tokens += before.token_ids
            sequence.length = len(sequence.tokens)
            sequence.prompt_logprobs_sent, sequence.finished = before.prompt_logprobs, before.ended
            if sequence.constraint is not None and not before.ended:
                for place, token in enumerate(before.token_ids):
                    # which way it would hurry to the end depends on all that it was asked
                    sequence.constraint.allowed(self.max_tokens - place)
                    sequence.constraint.accept(token)

    @property
    def lacks_grammar(self) -> bool:
        """`constrain` is still to be called."""
        return self.params.structured_outputs is not None and self.sequences[0].constraint is None

    def is_end(self, token: int) -> bool:
        """The token ends an output and is no text."""
        return token in self.eos_token_ids or token in self.stop_token_ids

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    def fail(self, error: BaseException) -> None:
        """End every sequence that has not ended, with `error`."""
        indices = [sequence.index for sequence in self.sequences if not sequence.finished]
        if indices and self.search is not None:
            indices = list(range(self.params.choices))
        for sequence in self.sequences:
            sequence.finished = True
        for index in indices:
            self.sink(TokenEvent(index, error=error))

    @property
    def wants_logprobs(self) -> bool:
        """Log-probabilities are needed for the user, or to rank `best_of`."""
        params = self.params
        one_beam = params.use_beam_search and not params.searches
        return params.logprobs is not None or params.choices > params.n or one_beam


class Sequence:
    """One output of a request, and what it holds: blocks, their hash keys, a device row."""

    __slots__ = (
        "alone_until",
        "beam",
        "block_keys",
        "blocks",
        "coming_key",
        "constraint",
        "epoch",
        "finished",
        "index",
        "length",
        "limit",
        "named",
        "num_prompt",
        "prompt_logprobs_sent",
        "request",
        "row",
        "scheduled",
        "tokens",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.tokens: list[int] = list(request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.length = self.num_prompt
        self.limit = self.num_prompt + request.max_tokens
        """The `length` with which every token it may make is made or under way. A beam may make one, until the search
        has chosen."""
        self.scheduled = 0
        self.blocks: list[int] = []
        self.block_keys: list[bytes] = []
        """Hash-chain keys of the full blocks published so far."""
        self.named: list[bytes] = []
        """Keys of the blocks after those, which steps under way fill."""
        self.coming_key = b""
        """Key of the block of its prompt that is filled next, while there is one."""
        self.row = -1
        self.finished = False
        """Ended; of a beam: or it does not live."""
        self.epoch = 0
        """Counts preemptions: a step launched in an earlier epoch wrote to blocks that are no longer this
        sequence's."""
        self.alone_until = 0
        """After a step failed: run without company until so many tokens are computed, to find out whose fault it
        was."""
        self.prompt_logprobs_sent = 0
        self.constraint: Constraint | None = None
        self.beam: Beam | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first: lower priority value, earlier arrival, lower index."""
        return (self.request.priority, self.request.arrival, self.index)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def samples_pending(self) -> bool:
        """A sampled token of this sequence has not come back from the device yet."""
        return self.length > len(self.tokens)

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.request.request_id}/{self.index} {self.scheduled}/{self.length} tokens, row {self.row}>"
        )
