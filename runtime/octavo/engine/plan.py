"""The message from the scheduler to the runner: what one step does. Plain data, so that it can cross a process
boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class SourcePlace:
    """The blocks that hold a source's keys and values for cross-attention, of all layers of the decoder."""

    length: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewSource:
    """A source to be encoded, and where its keys and values go."""

    ids: tuple[int, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence that was given a device row: its tokens so far, and how its tokens are sampled."""

    row: int
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    seed: int
    wants_logprobs: bool
    stop_ids: tuple[int, ...]
    """All tokens that end it: forbidden before `min_tokens`."""
    bad_word_ids: tuple[tuple[int, ...], ...]
    source: SourcePlace | None = None
    """Where the keys and values of its source are, in an encoder-decoder."""


@dataclass(frozen=True, slots=True)
class RowStep:
    """Run `count` tokens of a row, from position `start`; sample the next token if these are all it has."""

    row: int
    start: int
    count: int
    samples: bool
    prompt_logprobs: int | None = None
    """Return log-probabilities for the prompt tokens that follow each of these tokens, with this many alternatives."""


@dataclass(frozen=True, slots=True)
class SearchedStep:
    """A step of a beam: the device adds `score`, the beam's own, to the log-probabilities of its next tokens and
    returns the `keep` best."""

    entry: int
    """Place in the plan's `steps`."""
    score: float
    keep: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Order of work: copies, new rows, new blocks, tokens, sources, forward, sample."""

    steps: list[RowStep]
    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    """(row, index in its block table, block); each place once."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source block, destination block): copy on write, and the null block's zeros over blocks of a failed sequence. A
    block that is read is written by a later copy at most."""

    shared_blocks: int = 0
    """All sequences of the step have one token and begin with so many blocks in common."""
    masked: tuple[int, ...] = ()
    """Entries of `steps` that sample under a grammar: the loop has a mask for each."""
    sources: list[NewSource] = field(default_factory=list)
    tokens: list[tuple[int, int, int]] = field(default_factory=list)
    """(row, position, token): what the host has chosen. Entered after new rows and new blocks."""
    searched: tuple[SearchedStep, ...] = ()
    """Those of `steps` that want candidates instead of a token."""

    @property
    def num_tokens(self) -> int:
        return sum(step.count for step in self.steps)


Masks = Callable[[], "list[np.ndarray | None]"]
"""The masks of a step, one for each of `masked`, [ceil(V / 32)] int32; None: anything goes. They depend on the tokens
of the step before: who asks waits for those, so a runner asks when all else is launched."""
