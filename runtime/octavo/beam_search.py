"""The vocabulary of `LLM.beam_search`, with the names of vLLM's. The search itself runs in the engine, as that of any
request with `SamplingParams(use_beam_search=True)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

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
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        params = SamplingParams(use_beam_search=True, **settings)  # checked first: the caller knows of no `n`
        return replace(params, n=self.beam_width)


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
