"""`StructuredCalls`: structured_predict and its twins. The schema of the pydantic class is a grammar while decoding, so
the model cannot answer anything else.

`as_structured_llm` and every other part of LlamaIndex that asks for structured output comes here. Another
`pydantic_program_mode` than the default takes LlamaIndex's own way, by a tool or by a request in the prompt.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, cast

from llama_index.core.base.llms.types import ChatResponse
from llama_index.core.bridge.pydantic import BaseModel, ValidationError
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.llm import dispatcher
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.types import Model, PydanticProgramMode
from llama_index.llms.octavo.tools import ToolCalls
from pydantic_core import from_json

from octavo.errors import RequestError


class StructuredCalls(ToolCalls):
    """Answers that are instances of a pydantic class."""

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """The answer as an instance of `output_cls`. llm_kwargs: arguments of `chat`.

        Raises `RequestError` when `max_tokens` (or the context) ended the output before it was complete, and pydantic's
        `ValidationError` when a check of the class fails that its schema does not express.
        """
        if not self._by_grammar:
            return cast(Model, super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args))
        _started(output_cls, prompt, prompt_args)
        response = self.chat(self._get_messages(prompt, **prompt_args), **_asking(output_cls, llm_kwargs))
        return _ended(_instance(output_cls, response))

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """`structured_predict` for asyncio."""
        if not self._by_grammar:
            return cast(Model, await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args))
        _started(output_cls, prompt, prompt_args)
        response = await self.achat(self._get_messages(prompt, **prompt_args), **_asking(output_cls, llm_kwargs))
        return _ended(_instance(output_cls, response))

    # LlamaIndex's stream_structured_predict and its twin send the events around these two.

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        if not self._by_grammar:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        messages = self._get_messages(prompt, **prompt_args)
        return self._instances(output_cls, messages, _asking(output_cls, llm_kwargs))

    def _instances(self, output_cls: type[Model], messages: Any, asking: dict[str, Any]) -> Generator[Any, None, None]:
        parts, stream = _Parts(output_cls), self.stream_chat(messages, **asking)
        try:
            for response in stream:
                if (part := parts.next(response)) is not None:
                    yield part
        finally:
            stream.close()

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        if not self._by_grammar:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        messages = self._get_messages(prompt, **prompt_args)
        return self._ainstances(output_cls, messages, _asking(output_cls, llm_kwargs))

    async def _ainstances(
        self, output_cls: type[Model], messages: Any, asking: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        parts, stream = _Parts(output_cls), await self.astream_chat(messages, **asking)
        try:
            async for response in stream:
                if (part := parts.next(response)) is not None:
                    yield part
        finally:
            await stream.aclose()

    @property
    def _by_grammar(self) -> bool:
        return self.pydantic_program_mode == PydanticProgramMode.DEFAULT


class _Parts:
    """A structured answer as it grows: instances of the class where what is there validates, else of a class of the
    same fields that may lack any."""

    def __init__(self, output_cls: type[BaseModel]) -> None:
        self._class = output_cls
        self._flexible: type[FlexibleModel] = create_flexible_model(output_cls)
        self._seen: Any = None

    def next(self, response: ChatResponse) -> BaseModel | None:
        """What there is now, if it is more than before; at the end the whole."""
        if response.raw is not None:
            return _instance(self._class, response)
        value = from_json(response.message.content or "{}", allow_partial="trailing-strings")
        if not isinstance(value, dict) or value == self._seen:
            return None
        self._seen = value
        try:
            return self._class.model_validate(value)
        except ValidationError:
            return self._flexible.model_validate(value)


def _asking(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {**(llm_kwargs or {}), "response_format": output_cls}


def _started(output_cls: type[BaseModel], prompt: BasePromptTemplate, prompt_args: dict[str, Any]) -> None:
    dispatcher.event(LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args))


def _ended(output: Model) -> Model:
    dispatcher.event(LLMStructuredPredictEndEvent(output=output))
    return output


def _instance(output_cls: type[Model], response: ChatResponse) -> Model:
    if response.additional_kwargs.get("finish_reason") == "length":
        made = response.additional_kwargs.get("completion_tokens")
        raise RequestError(
            f"the output ended after {made} tokens, before the {output_cls.__name__} was complete: raise max_tokens",
            "max_tokens",
        )
    return output_cls.model_validate_json(response.message.content or "")
