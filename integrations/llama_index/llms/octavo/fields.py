"""`OctavoFields`: what an `Octavo` is made of. Fields and their checks, its engine, copies, what is written down.

The base of `llm.Octavo`; nothing here makes a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, fields
from types import TracebackType
from typing import Any, Literal, Self

from llama_index.core.base.llms.types import LLMMetadata
from llama_index.core.bridge.pydantic import Field, PrivateAttr, ValidationError, field_serializer
from llama_index.core.constants import DEFAULT_TEMPERATURE
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.llms.octavo.model_facts import OwnTemplate, metadata_of
from llama_index.llms.octavo.options import SAMPLING, TEMPLATED, refuse_unknown

from octavo.async_llm import AsyncLLM
from octavo.config import engine_config_from
from octavo.errors import ConfigError, RequestError
from octavo.llm import LLM
from octavo.models.sources import DEFAULT_MODEL
from octavo.sampling_params import SamplingParams
from octavo.shared import SharedEngine
from octavo.structured_outputs import StructuredOutputsParams

_SECRETS = ("token", "hf_token")
_FORMS = frozenset(field.name for field in fields(StructuredOutputsParams))
_OF_THIS_PROCESS = ("callback_manager", "rate_limiter")


class OctavoFields(FunctionCallingLLM):
    """Fields of `Octavo`. For sampling parameters None means the default of `SamplingParams`."""

    model: str = Field(default=DEFAULT_MODEL, description="A folder, a GGUF file or a model id.", frozen=True)
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, frozen=True,
        description="Settings of the engine: the fields of EngineConfig, as LLM(...) takes them.",
    )  # fmt: skip
    additional_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of every call, by the names that chat() takes."
    )

    temperature: float | None = Field(default=DEFAULT_TEMPERATURE, description="0 takes the most likely token.")
    top_p: float | None = Field(default=None, description="Keep the most likely tokens up to this probability, (0, 1].")
    top_k: int | None = Field(default=None, description="Keep this many most likely tokens; 0 keeps all.")
    min_p: float | None = Field(default=None, description="Keep tokens this many times as likely as the likeliest.")
    n: int | None = Field(default=None, description="Outputs of a request: the first is the answer, all are in raw.")
    best_of: int | None = Field(default=None, description="Outputs made, of which the n likeliest are returned.")
    max_tokens: int | None = Field(default=None, description="Most tokens to make; None: up to the model's length.")
    min_tokens: int | None = Field(default=None, description="No end before this many tokens.")
    stop: str | list[str] | None = Field(default=None, description="Strings at which the output ends.")
    stop_token_ids: list[int] | None = Field(default=None, description="Tokens at which the output ends.")
    include_stop_str_in_output: bool | None = Field(default=None, description="Leave the stop string in the text.")
    ignore_eos: bool | None = Field(default=None, description="Go on after the end-of-sequence token.")
    presence_penalty: float | None = Field(default=None, description="For tokens that were made already, [-2, 2].")
    frequency_penalty: float | None = Field(default=None, description="For each time that they were made, [-2, 2].")
    repetition_penalty: float | None = Field(
        default=None, description="Above 1: repeats less, the prompt's tokens too."
    )
    logit_bias: dict[int, float] | None = Field(default=None, description="Added to the logits, by token id.")
    bad_words: list[str] | None = Field(default=None, description="Words which are never made.")
    allowed_token_ids: list[int] | None = Field(default=None, description="Only these tokens are made.")
    logprobs: int | None = Field(default=None, description="Log-probabilities of this many most likely tokens.")
    prompt_logprobs: int | None = Field(default=None, description="The same for the prompt, in raw.")
    seed: int | None = Field(default=None, description="The same seed gives the same tokens, whatever else runs.")
    no_repeat_ngram_size: int | None = Field(default=None, description="No run of so many tokens is made twice.")
    use_beam_search: bool | None = Field(default=None, description="Search for the likeliest outputs instead.")
    beam_width: int | None = Field(default=None, description="Beams of a search.")
    length_penalty: float | None = Field(default=None, description="Of a search: above 0 favours long outputs.")
    early_stopping: bool | Literal["never"] | None = Field(default=None, description="When a search ends.")
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = Field(
        default=None, description="The form that every output must have: json, regex, choice, grammar or json_object."
    )
    skip_special_tokens: bool | None = Field(default=None, description="Leave control tokens out of the text.")
    detokenize: bool | None = Field(default=None, description="False: token ids only (in raw), no text.")

    _shared: SharedEngine = PrivateAttr()
    _metadata: LLMMetadata | None = PrivateAttr(default=None)

    def __init__(self, model: str = DEFAULT_MODEL, **kwargs: Any) -> None:
        refuse_unknown(kwargs, frozenset(type(self).model_fields), "argument")
        try:
            super().__init__(model=model, **kwargs)
        except ValidationError as error:
            raise _as_our_error(error) from error
        refuse_unknown(self.additional_kwargs, SAMPLING | TEMPLATED, "entry of additional_kwargs")
        engine_config_from(self.model, self.engine_kwargs)  # a bad setting is refused now, not at the first call
        self.sampling_params({})
        self._shared = SharedEngine(self.model, **self.engine_kwargs)
        if kwargs.get("messages_to_prompt") is None:
            self.messages_to_prompt = OwnTemplate(self._shared)

    # ---------------------------------------------------------------- parameters

    def sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The fields of this object, over them `additional_kwargs`, over them `given`; None leaves a default in place.
        Raises `RequestError` that names the bad one."""
        own = {name: getattr(self, name) for name in SAMPLING}
        more = {**self.additional_kwargs, **given}
        layers = {**own, **more}
        merged = {name: value for name, value in layers.items() if name in SAMPLING and value is not None}
        if merged.get("use_beam_search") and "temperature" not in more and self.temperature == DEFAULT_TEMPERATURE:
            del merged["temperature"]  # LlamaIndex's default, which does not apply to a search
        form = merged.get("structured_outputs")
        if isinstance(form, Mapping):
            refuse_unknown(form, _FORMS, "entry of structured_outputs")
            merged["structured_outputs"] = StructuredOutputsParams(**form)
        return SamplingParams(**{"max_tokens": None, **merged})

    # ---------------------------------------------------------------- the model

    @property
    def metadata(self) -> LLMMetadata:
        """Read from the model's files; weights are loaded only where the context depends on them (on a GPU).

        `context_window` is what the engine holds, prompt and output together, in tokens.
        """
        if self._metadata is None:
            self._metadata = metadata_of(self._shared)
        known = self._metadata
        return known.model_copy(update={"num_output": min(self.max_tokens or known.num_output, known.context_window)})

    def to_payload(self) -> dict[str, Any]:
        """What events say of this model. Reads no file, as it runs in the event loop too; holds no secret."""
        known = {} if self._metadata is None else self.metadata.model_dump()
        return {
            "class_name": self.class_name(), "model_name": self.model, "temperature": self.temperature,
            "max_tokens": self.max_tokens, **known,
        }  # fmt: skip

    @property
    def engine(self) -> LLM:
        """The engine for synchronous code, loaded at the first use, shared with everything of the same settings."""
        return self._shared.llm

    async def async_engine(self) -> AsyncLLM:
        """The same engine for asyncio. The first use loads it without blocking the event loop."""
        return await self._shared.start()

    # ---------------------------------------------------------------- life

    def close(self) -> None:
        """Let go of the engine; the last user's `close` gives the memory back. Safe to call twice."""
        self._shared.close()

    async def aclose(self) -> None:
        """`close()` without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # ---------------------------------------------------------------- copies, and what is written down

    @classmethod
    def class_name(cls) -> str:
        return "Octavo"

    def _arguments(self) -> dict[str, Any]:
        """What makes this object again."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        if isinstance(given.get("messages_to_prompt"), OwnTemplate):
            del given["messages_to_prompt"]
        return given

    def __copy__(self) -> Self:
        """A user of the engine in its own right: closing one does not close the other."""
        return type(self)(**self._arguments())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {name: value for name, value in self._arguments().items() if name not in _OF_THIS_PROCESS}
        return _make, (type(self), arguments)

    @field_serializer("engine_kwargs")
    def _without_secrets(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name not in _SECRETS}

    @field_serializer("structured_outputs")
    def _form_as_dict(self, form: StructuredOutputsParams | dict[str, Any] | None) -> dict[str, Any] | None:
        if not isinstance(form, StructuredOutputsParams):
            return form
        return {name: value for name, value in asdict(form).items() if value is not None}


def _make(kind: type[OctavoFields], arguments: dict[str, Any]) -> OctavoFields:
    return kind(**arguments)


def _as_our_error(error: ValidationError) -> RequestError | ConfigError:
    """pydantic's first complaint, as the error that the rest of Octavo raises for such a field."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else None
    message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return ConfigError(message, name) if name in ("model", "engine_kwargs") else RequestError(message, name)
