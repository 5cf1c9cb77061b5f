"""From a request's fields to `SamplingParams`. Called by `chat`, `completions` and `responses`."""

from __future__ import annotations

from typing import Any

from octavo.async_llm import AsyncLLM
from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams
from octavo.server.errors import refused
from octavo.server.protocol.sampling import Sampling
from octavo.structured_outputs import StructuredOutputsParams

_SAME = (
    "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "bad_words", "allowed_token_ids", "prompt_logprobs", "use_beam_search", "length_penalty",
    "early_stopping", "beam_width", "no_repeat_ngram_size",
)  # fmt: skip
"""Fields that both have, under one name."""
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
BIAS = 100.0
"""What a bias may be, either way: OpenAI's."""


def sampling_params(body: Sampling, llm: AsyncLLM, *, max_tokens: int | None, **more: Any) -> SamplingParams:
    """Raises `RequestError` or `ApiError` that name the field. `max_tokens`: what it is where the body has none;
    `more`: parameters that have other names in the body."""
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.max_tokens is not None:
        max_tokens = checked_room("max_tokens", body.max_tokens, llm)
    if given.get("use_beam_search") and given.get("temperature") is None:
        given["temperature"] = 0.0
    if body.logit_bias:
        given["logit_bias"] = _biases(body.logit_bias)
    form = _structured_outputs(body)
    if form is not None:
        given["structured_outputs"] = form
    given.update((name, value) for name, value in more.items() if value is not None)
    return SamplingParams(max_tokens=max_tokens, **given)


def checked_room(name: str, tokens: int, llm: AsyncLLM) -> int:
    """A number of tokens to make. What has no room beside the prompt is cut, what never has room is refused."""
    room = llm.engine.limits.max_model_len
    if not 1 <= tokens <= room:
        raise refused(f"{name} must be from 1 to {room}, which is what the model holds, not {tokens}", name)
    return tokens


def form_name(body: Sampling) -> str:
    """The field that asks for a form of the output."""
    given = (name for name in _GUIDED if getattr(body, name) is not None)
    return next(given, "structured_outputs" if body.structured_outputs is not None else "response_format")


def _biases(given: dict[str, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdecimal()) or len(name) > 10:
            raise refused(f"logit_bias: {name[:20]!r} is no token id", "logit_bias")
        if abs(value) > BIAS:
            raise refused(f"logit_bias: a bias must be from {-BIAS:g} to {BIAS:g}, not {value:g}", "logit_bias")
        if found.setdefault(int(name), value) != value:
            raise refused(f"logit_bias: {name!r} is given twice", "logit_bias")
    return found


def _structured_outputs(body: Sampling) -> StructuredOutputsParams | None:
    """Of `structured_outputs`, or of vLLM's older `guided_*` fields."""
    found: list[tuple[str, dict[str, Any]]] = []
    if body.structured_outputs is not None:
        given = body.structured_outputs.model_dump(exclude_none=True)
        found.append(("structured_outputs", {name.removesuffix("_"): value for name, value in given.items()}))
    for name, inner in _GUIDED.items():
        value = getattr(body, name)
        if value is not None:
            found.append((name, {inner: value}))
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise refused(f"{names} exclude each other: give one of them", found[1][0])
    name, settings = found[0]
    try:
        return StructuredOutputsParams(**settings)
    except RequestError as error:
        raise refused(str(error), name) from error
