"""The vocabulary of `LLM.beam_search`, with the names of vLLM's. The search itself runs in the engine, as that of any
request with `SamplingParams(use_beam_search=True)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.errors import RequestError
from octavo.outputs import RequestOutput
from octavo.sampling_params import EarlyStopping, SamplingParams
from octavo.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Parameters of one search; each means what it means in `SamplingParams`."""

    beam_width: int
    max_tokens: int | None
    ignore_eos: bool = False
    temperature: float = 0.0
    """0 or 1, which are the same: sums are of log-probabilities as they are."""
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    min_tokens: int = 0
    no_repeat_ngram_size: int = 0
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True

    def sampling(self) -> SamplingParams:
        """As `SamplingParams` that return all beams. Raises `RequestError`."""
        if isinstance(self.beam_width, bool) or not isinstance(self.beam_width, int):
            raise RequestError(f"beam_width must be an integer, not {self.beam_width!r}", "beam_width")
        return SamplingParams(
            use_beam_search=True, beam_width=self.beam_width, n=self.beam_width, max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos, temperature=self.temperature, length_penalty=self.length_penalty,
            early_stopping=self.early_stopping, min_tokens=self.min_tokens,
            no_repeat_ngram_size=self.no_repeat_ngram_size, allowed_token_ids=self.allowed_token_ids,
            skip_special_tokens=self.skip_special_tokens,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One finished beam. As in vLLM, prompt and output together; the output alone is in what `generate` returns."""

    tokens: list[int]
    text: str
    cum_logprob: float
    score: float
    """The sum of log-probabilities over (tokens ** `length_penalty`), by which beams are ranked."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The finished beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


def checked_params(params: object) -> SamplingParams:
    """Raises `RequestError`."""
    if not isinstance(params, BeamSearchParams):
        raise RequestError(f"params must be BeamSearchParams, not {type(params).__name__}", "params")
    return params.sampling()


def beam_search_output(tokenizer: Tokenizer, output: RequestOutput, params: SamplingParams) -> BeamSearchOutput:
    """What `generate` returned, in this shape."""
    sequences = []
    for choice in output.outputs:
        tokens = output.prompt_token_ids + choice.token_ids
        text = tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)
        sums = choice.cumulative_logprob or 0.0, choice.score or 0.0
        sequences.append(BeamSearchSequence(tokens, text, *sums, choice.finish_reason, choice.stop_reason))
    return BeamSearchOutput(sequences)
