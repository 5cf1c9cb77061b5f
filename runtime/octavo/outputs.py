"""What comes back from a request: whole outputs, pieces of a stream, log-probabilities, timings. Names as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability under the raw logits; `rank` 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""By token id: the chosen token and the most likely ones, best first."""


@dataclass(slots=True)
class CompletionOutput:
    """One output of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum over the tokens; None unless `logprobs`, `best_of` or `use_beam_search` asked for it."""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """"stop" (end-of-sequence, stop token or stop string), "length" or "abort"."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for end-of-sequence."""
    score: float | None = None
    """By which a beam search ranks: the sum of log-probabilities over (tokens ** `length_penalty`)."""

    def finished(self) -> bool:
        return self.finish_reason is not None

    def _repr_html_(self) -> str:
        from octavo.html import completion_html

        return completion_html(self)


@dataclass(slots=True)
class RequestMetrics:
    """Seconds since `arrival` (a `time.monotonic()` value), and counts."""

    arrival: float = 0.0
    queue_time: float | None = None
    """Until the request's first step was planned."""
    first_token_time: float | None = None
    """Until its first token was known: queue plus prefill."""
    last_token_time: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix cache."""
    output_tokens: int = 0
    preemptions: int = 0

    @property
    def prefill_time(self) -> float | None:
        """Seconds between the first step and the first token."""
        if self.first_token_time is None or self.queue_time is None:
            return None
        return self.first_token_time - self.queue_time

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds between tokens after the first, over all outputs of the request."""
        if self.first_token_time is None or self.last_token_time is None or self.output_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.output_tokens - 1)


@dataclass(slots=True)
class RequestOutput:
    """A request's prompt and outputs. `finished` is False for one that was aborted."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry a prompt token; the first is None."""
    source_token_ids: list[int] | None = None
    """What the encoder of an encoder-decoder read; its `prompt_token_ids` are what the decoder began with."""

    @property
    def num_cached_tokens(self) -> int:
        return self.metrics.cached_tokens

    @property
    def text(self) -> str:
        """Text of the first output."""
        return self.outputs[0].text

    def _repr_html_(self) -> str:
        from octavo.html import request_html

        return request_html(self)


@dataclass(slots=True)
class TranslationOutput:
    """The translation of one text: its sentences joined, with the blanks and line ends of the original."""

    text: str
    original: str
    sentences: list[RequestOutput]
    """Of each part that was translated by itself, with its tokens and timings. With `n` above 1 each has further
    outputs, other translations of it; `text` is made of the first."""

    @property
    def truncated(self) -> bool:
        """A sentence ended because it had `max_tokens`."""
        return any(output.outputs[0].finish_reason == "length" for output in self.sentences)


@dataclass(slots=True)
class EmbeddingOutput:
    """The embedding of one text."""

    embedding: list[float]
    prompt_token_ids: list[int]
    truncated: bool
    """The text was longer than the model reads, and its end does not count."""
    metrics: RequestMetrics


@dataclass(slots=True)
class StreamPiece:
    """What is new in one output of a streamed request. The last piece of an output has `finish_reason`; the last piece
    of the request has `output` too."""

    text: str
    token_ids: list[int]
    index: int = 0
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    output: RequestOutput | None = None
