"""How a request's tokens are chosen and when it ends. Checked when made; names and meanings as in vLLM's class of this
name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, TypeVar

from octavo.errors import RequestError
from octavo.structured_outputs import StructuredOutputsParams

T = TypeVar("T")
EarlyStopping = bool | Literal["never"]

MAX_LOGPROBS = 100
MAX_CHOICES = 128
DEFAULT_WIDTH = 4
MAX_INT32 = 2**31 - 1
GREEDY_BELOW = 1e-5
"""A temperature below this is 0: in float32 the logits over it would overflow, and nobody could tell it from greedy."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    The order of work on the logits: `structured_outputs`, `allowed_token_ids`, `bad_words`,
    `no_repeat_ngram_size`, `min_tokens`, `logit_bias`, repetition, frequency and presence penalties, `temperature`,
    `min_p`, `top_k`, `top_p`. Log-probabilities are those of the raw logits.

    Raises `RequestError` (a `ValueError`) whose `field` names the parameter that is out of range.
    """

    temperature: float = 1.0
    """0 takes the most likely token (greedy); so does anything below 1e-5. At most 1e6, which is uniform."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this, (0, 1]."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one, [0, 1]."""
    n: int = 1
    """How many outputs to return for the prompt."""
    best_of: int | None = None
    """How many outputs to make; the `n` with the highest cumulative log-probability are returned. At least `n`."""
    max_tokens: int | None = 16
    """Most tokens to make; None: up to the model's length."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many tokens."""
    stop: str | Sequence[str] | None = None
    """Strings at which the output ends; not part of the text unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens at which the output ends, besides the model's own."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token of the output so far, [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time the token stands in the output so far, [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of prompt and output (arXiv 1909.05858),
    [1e-4, 1e4]."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits, by token id."""
    bad_words: Sequence[str] | None = None
    """Words which are never made (their last token is forbidden after the others)."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these tokens are made."""
    logprobs: int | None = None
    """Return the log-probability of each chosen token and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    seed: int | None = None
    """The same request with the same seed gives the same tokens, whatever else runs. None: drawn from the engine's
    seed."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens stands twice in prompt and output together; 0: any may."""
    use_beam_search: bool = False
    """Search for the `n` outputs with the highest `score` instead of drawing tokens. Temperature and filters do not
    apply; processors and penalties change log-probabilities then, not logits. As transformers' `num_beams`."""
    beam_width: int | None = None
    """Beams that are followed at once, at least `n`; 1 is greedy. None: `best_of`, else 4 or `n`."""
    length_penalty: float = 1.0
    """An output's score is its sum of log-probabilities over (its tokens ** this): above 0 favours long outputs."""
    early_stopping: EarlyStopping = False
    """When a search ends: True as soon as `beam_width` outputs are finished; False when no beam could become better at
    its present length; "never" when none could at any length."""
    structured_outputs: StructuredOutputsParams | None = None
    """The form that the output must have. It ends when the form is complete."""
    skip_special_tokens: bool = True
    detokenize: bool = True
    """False: token ids only, no text (then no stop strings)."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        _number("temperature", self.temperature, 0.0, 1e6)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 1e-4, 1e4)
        _integer("top_k", self.top_k, -1, MAX_INT32)
        if self.temperature < GREEDY_BELOW:
            set_(self, "temperature", 0.0)
        _integer("n", self.n, 1, MAX_CHOICES)
        _integer("min_tokens", self.min_tokens, 0)
        if self.best_of is not None:
            _integer("best_of", self.best_of, 1, MAX_CHOICES)
            if self.best_of < self.n:
                raise RequestError(f"best_of must be at least n={self.n}, not {self.best_of}", "best_of")
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}", "min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        flags = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize", "use_beam_search")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, not {getattr(self, name)!r}", name)
        set_(self, "stop", _strings("stop", self.stop))
        set_(self, "bad_words", _strings("bad_words", self.bad_words))
        set_(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        set_(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: no token could be made", "allowed_token_ids")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError("logit_bias must map token ids to numbers", "logit_bias")
            _token_ids("logit_bias", list(self.logit_bias))
            for value in self.logit_bias.values():
                _number("logit_bias", value, -1e4, 1e4)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise RequestError(
                f"structured_outputs must be StructuredOutputsParams, not {type(self.structured_outputs).__name__}",
                "structured_outputs",
            )
        _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_INT32)
        self._check_search()
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True", "stop")

    def _check_search(self) -> None:
        _number("length_penalty", self.length_penalty, -5.0, 5.0)
        if self.early_stopping not in (True, False, "never"):
            raise RequestError(
                f'early_stopping must be True, False or "never", not {self.early_stopping!r}', "early_stopping"
            )
        if self.beam_width is not None:
            _integer("beam_width", self.beam_width, 1, MAX_CHOICES)
        if not self.use_beam_search:
            defaults = {"beam_width": None, "length_penalty": 1.0, "early_stopping": False}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise RequestError(f"{name} needs use_beam_search=True", name)
            return
        width = self.width
        if self.best_of not in (None, width):
            raise RequestError(f"best_of={self.best_of} is not beam_width={width}: give one of them", "best_of")
        if width < self.n:
            raise RequestError(f"beam_width must be at least n={self.n}, not {width}", "beam_width")
        if self.temperature not in (0.0, 1.0):
            raise RequestError(f"temperature={self.temperature:g} does not apply to a beam search: leave it out",
                               "temperature")  # fmt: skip
        object.__setattr__(self, "temperature", 0.0)  # one beam alone takes the likeliest token
        unused = {"top_p": 1.0, "min_p": 0.0, "logprobs": None, "prompt_logprobs": None, "structured_outputs": None}
        for name, value in {**unused, "stop": ()}.items():
            if getattr(self, name) != value:
                raise RequestError(f"{name} cannot go with use_beam_search: leave it out", name)
        if self.top_k > 0:
            raise RequestError("top_k cannot go with use_beam_search: leave it out", "top_k")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def searches(self) -> bool:
        """By beams: one alone is greedy."""
        return self.use_beam_search and self.width > 1

    @property
    def width(self) -> int:
        """Sequences made for the request: of a search `beam_width`, else `best_of`, else `n`."""
        if self.use_beam_search:
            return self.beam_width or self.best_of or max(DEFAULT_WIDTH, self.n)
        return self.best_of or self.n

    @property
    def choices(self) -> int:
        """Outputs that the engine sends: of a search the best, else one for each sequence."""
        return self.n if self.searches else self.width


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, not {value!r}", name)
    if value < low or value > high or (open_low and value == low):
        low_word = "above" if open_low else "at least"
        raise RequestError(f"{name} must be {low_word} {low:g} and at most {high:g}, not {value!r}", name)


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, not {value!r}", name)
    if value < low or (high is not None and value > high):
        top = "" if high is None else f" and at most {high}"
        raise RequestError(f"{name} must be at least {low}{top}, not {value}", name)


def _strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else _items(name, value)
    if not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"{name} must be strings that are not empty", name)
    return texts


def _token_ids(name: str, value: Sequence[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    tokens = _items(name, value)
    for token in tokens:
        _integer(name, token, 0)
    return tokens


def _items(name: str, value: Sequence[T] | Set[T]) -> tuple[T, ...]:
    if not isinstance(value, Sequence | Set):
        raise RequestError(f"{name} must be a list, not {type(value).__name__}", name)
    return tuple(value)
