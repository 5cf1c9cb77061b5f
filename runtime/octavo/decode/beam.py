"""The scores of a beam search: which beams live on, what is finished, when it ends. Knows neither blocks nor torch.

Numbers and rules are those of transformers' `_beam_search` (5.x), so that outputs can be equal to its outputs: sums in
float32, a candidate list longer than the beams by as much as tokens that end could take from it, the length penalty on
all tokens made, the end by the same estimate. One `BeamSearch` per request; the engine calls `select` each time all
beams have their candidates (`engine/beams.py`), the device has chosen these (`decode/sampler.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack, unpack

from octavo.sampling_params import EarlyStopping


@dataclass(slots=True)
class Candidates:
    """Of one beam: the tokens that may come next and the sums of log-probabilities up to them, best first."""

    tokens: list[int]
    scores: list[float]


@dataclass(frozen=True, slots=True)
class Child:
    """A beam that lives on: the place of its parent among the beams before, its new token, its sum."""

    parent: int
    token: int
    score: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished output, its last token included."""

    tokens: list[int]
    cumulative_logprob: float
    score: float
    """Sum over length ** length_penalty: the higher, the better."""
    ended: bool
    """By a token that ends it, not by `max_tokens`."""


class BeamSearch:
    """`width` beams. `ends`: tokens that end an output. `returned`: how many of the finished ones will be asked for.
    `max_tokens`: the most that a beam may make; `length_offset`: tokens at the end of the prompt which count as made,
    with log-probability 0 (a forced first token).
    """

    def __init__(
        self, width: int, *, returned: int, ends: frozenset[int], max_tokens: int, length_penalty: float,
        early_stopping: EarlyStopping, length_offset: int = 0,
    ) -> None:  # fmt: skip
        self.width, self.returned, self.ends = width, returned, ends
        self.max_length = max_tokens + length_offset
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.finished: list[Hypothesis] = []
        """Best first, `width` of them at most."""
        self.done = False
        self._offset = length_offset
        self._settled = 0

    @property
    def keep(self) -> int:
        """Candidates that are looked at in each step, and wanted of each beam."""
        return max(2, 1 + len(self.ends)) * self.width

    def select(self, histories: Sequence[Sequence[int]], candidates: Sequence[Candidates]) -> list[Child]:
        """One step: `histories[i]` are the tokens that beam i has made, all of one length. Returns the beams that live
        on, best first; none when `done`."""
        best = self._best(candidates)
        length = len(histories[0]) + 1 + self._offset
        full = length >= self.max_length
        living: list[Child] = []
        for rank, (score, parent, token) in enumerate(best):
            ended = token in self.ends
            if not (ended or full):
                if len(living) < self.width:
                    living.append(Child(parent, token, score))
            elif rank < self.width:
                made = [*histories[parent], token]
                self.finished.append(Hypothesis(made, score, self._penalised(score, length), ended))
        self.finished.sort(key=lambda found: -found.score)
        del self.finished[self.width :]
        self.done = not living or self._enough(living[0].score, length)
        return [] if self.done else living

    def settled(self, histories: Sequence[Sequence[int]]) -> list[int]:
        """What is new of the tokens with which every output will begin. `histories`: of the beams that live on."""
        outputs = [*histories, *(found.tokens for found in self.finished[: self.returned])]
        first, begin, end = outputs[0], self._settled, self._settled
        while all(end < len(tokens) and tokens[end] == first[end] for tokens in outputs):
            end += 1
        self._settled = end
        return list(first[begin:end])

    @property
    def results(self) -> list[tuple[Hypothesis, list[int]]]:
        """The outputs, best first, each with those of its tokens that were not settled before."""
        return [(found, found.tokens[self._settled :]) for found in self.finished[: self.returned]]

    def _best(self, candidates: Sequence[Candidates]) -> list[tuple[float, int, int]]:
        """(sum, beam, token) of the best over all beams. Of equals the first beam's, and of those the lower token."""
        every = [
            (-score, parent, token)
            for parent, found in enumerate(candidates)
            for score, token in zip(found.scores[: self.keep], found.tokens, strict=False)
            if score > float("-inf")
        ]
        every.sort()
        return [(-negative, parent, token) for negative, parent, token in every[: self.keep]]

    def _penalised(self, score: float, length: int) -> float:
        return _float32(score / _float32(length**self.length_penalty))

    def _enough(self, best: float, length: int) -> bool:
        """What lives cannot become better than what is finished; `best` is the highest sum that lives."""
        if len(self.finished) < self.width:
            return False
        if self.early_stopping is True:
            return True
        longest = self.early_stopping == "never" and self.length_penalty > 0
        return self._penalised(best, self.max_length if longest else length) <= self.finished[-1].score


def _float32(value: float) -> float:
    """The nearest number of this type. A quotient of two such, made in float64 and rounded, is what float32 gives."""
    number: float = unpack("f", pack("f", value))[0]
    return number
