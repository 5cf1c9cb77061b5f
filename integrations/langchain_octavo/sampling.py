"""Sampling parameters as fields of a LangChain object, and as keyword arguments of a call. Both classes inherit
`SamplingFields`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from octavo.client import Client
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputsParams
from pydantic import BaseModel, ConfigDict

SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))


class SamplingFields(BaseModel):
    """The fields of `SamplingParams`, with its meanings. None, unless said otherwise: as the model's own configuration
    for generation says, else the default of `SamplingParams`. Each can be given in a call too."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    """Most tokens to make. None: up to the model's length."""
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None
    """Log-probabilities of the chosen tokens and of this many most likely ones, in `response_metadata["logprobs"]`."""
    prompt_logprobs: int | None = None
    seed: int | None = None
    no_repeat_ngram_size: int | None = None
    use_beam_search: bool | None = None
    """Search for the likeliest answers, by `beam_width` beams; the model's own temperature does not count then."""
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool | None = None
    detokenize: bool | None = None

    def _given_sampling(self) -> dict[str, Any]:
        """The parameters that were given at construction."""
        return {name: value for name in SAMPLING_NAMES if (value := getattr(self, name)) is not None}

    def _sampling(self, stop: Sequence[str] | None, given: Mapping[str, Any], client: Client | None) -> SamplingParams:
        """The parameters of a call: those given in the call, at construction, by the model of `client`.

        Raises `RequestError` that names the field.
        """
        values = {"max_tokens": None, **self._given_sampling()}
        values |= {name: value for name, value in given.items() if value is not None or name == "max_tokens"}
        if client is not None and not values.get("use_beam_search"):
            values = {**model_defaults(client), **values}
        if stop is not None:
            values["stop"] = stop
        return SamplingParams(**values)


def model_defaults(client: Client) -> dict[str, Any]:
    """What the model's own configuration says of sampling."""
    found = {name: value for name, value in client.engine.model_config.generation_defaults.items() if value is not None}
    if "top_k" in found:
        found["top_k"] = int(found["top_k"])  # some files hold it as a float
    return {name: value for name, value in found.items() if name in SAMPLING_NAMES}
