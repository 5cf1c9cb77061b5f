"""`Octavo`: the eight calls of a LlamaIndex LLM.

Synchronous calls go to `LLM`, the others to `AsyncLLM`; both hand their requests to one engine, so all that run at once
are in one batch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.llms.octavo.answer import Answer, PlainParser
from llama_index.llms.octavo.messages import to_dicts
from llama_index.llms.octavo.model_facts import OwnTemplate
from llama_index.llms.octavo.options import CHAT, PLAIN, TEMPLATED, CallOptions, call_options
from llama_index.llms.octavo.streams import AsyncResponseStream, ResponseStream
from llama_index.llms.octavo.structured import StructuredCalls

from octavo.async_llm import AsyncTokenStream
from octavo.chat import plan_chat
from octavo.client import Client
from octavo.errors import RequestError
from octavo.llm import TokenStream
from octavo.outputs import StreamPiece
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputsParams
from octavo.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Job:
    """A request, checked and ready for either door."""

    prompt: Mapping[str, Any]
    params: SamplingParams
    priority: int
    answer: Answer


class Octavo(StructuredCalls):
    """A language model in this process, for LlamaIndex.

    Constructing one loads nothing; objects of the same `model` and `engine_kwargs` share one engine, whatever their
    other fields. Every field of `SamplingParams` is a field here and an argument of every call; calls also take
    `priority`, `chat_template`, `chat_template_kwargs` and `response_format` (a pydantic class, or OpenAI's dict), and
    chat calls `tools`, `tool_choice` and `parallel_tool_calls`. What is unknown or out of range is a `RequestError`
    (settings of the engine: `ConfigError`) that names it.

    Responses have usage in `raw["usage"]` and `additional_kwargs`; of a stream, the last one has. `complete` makes a
    message of the prompt for a model with a chat template, unless `formatted=True`: then the model gets it as it is.
    Use it as a context manager, or call `close()`.
    """

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        engine = self.engine
        job = self._chat_job(engine, messages, kwargs)
        outputs = engine.generate([job.prompt], job.params, priority=job.priority, use_tqdm=False)
        return job.answer.chat(outputs[0])

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        engine = await self.async_engine()
        job = self._chat_job(engine, messages, kwargs)
        return job.answer.chat((await engine.generate([job.prompt], job.params, priority=job.priority))[0])

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._stream(llm_chat_callback(), self._chat_job, Answer.chat_piece, messages, kwargs)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return await self._astream(llm_chat_callback(), self._chat_job, Answer.chat_piece, messages, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        engine = self.engine
        job = self._text_job(engine, prompt, {**kwargs, "formatted": formatted})
        outputs = engine.generate([job.prompt], job.params, priority=job.priority, use_tqdm=False)
        return job.answer.completion(outputs[0])

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        engine = await self.async_engine()
        job = self._text_job(engine, prompt, {**kwargs, "formatted": formatted})
        return job.answer.completion((await engine.generate([job.prompt], job.params, priority=job.priority))[0])

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        given = {**kwargs, "formatted": formatted}
        return self._stream(llm_completion_callback(), self._text_job, Answer.completion_piece, prompt, given)

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        given = {**kwargs, "formatted": formatted}
        return await self._astream(llm_completion_callback(), self._text_job, Answer.completion_piece, prompt, given)

    # ---------------------------------------------------------------- streams

    def _stream(
        self, callback: Callable[..., Any], make_job: Callable[..., _Job], show: Callable[..., Any], asked: Any,
        given: Mapping[str, Any],
    ) -> ResponseStream[Any]:  # fmt: skip
        """`callback` is LlamaIndex's decorator, which sends the events, those of the stream's end too."""
        opened: list[TokenStream] = []

        @callback
        def begin(_: Any, asked: Any, **given: Any) -> Generator[Any, None, None]:
            engine = self.engine
            job = make_job(engine, asked, given)
            opened.append(engine.stream(job.prompt, job.params, priority=job.priority))
            return _responses(opened[0], job.answer, show)

        return ResponseStream(begin(self, asked, **given), opened[0])

    async def _astream(
        self, callback: Callable[..., Any], make_job: Callable[..., _Job], show: Callable[..., Any], asked: Any,
        given: Mapping[str, Any],
    ) -> AsyncResponseStream[Any]:  # fmt: skip
        opened: list[AsyncTokenStream] = []

        @callback
        async def begin(_: Any, asked: Any, **given: Any) -> AsyncGenerator[Any, None]:
            engine = await self.async_engine()
            job = make_job(engine, asked, given)
            opened.append(engine.stream(job.prompt, job.params, priority=job.priority))
            return _async_responses(opened[0], job.answer, show)

        return AsyncResponseStream(await begin(self, asked, **given), opened[0])

    # ---------------------------------------------------------------- from arguments to a request

    def _chat_job(self, engine: Client, messages: Sequence[ChatMessage], given: Mapping[str, Any]) -> _Job:
        options = self._options(given, CHAT)
        params = self.sampling_params(given)
        to_prompt = self.messages_to_prompt
        if to_prompt is not None and not isinstance(to_prompt, OwnTemplate):
            if options.tools:
                message = "tools need the model's chat template: leave messages_to_prompt out, or the tools"
                raise RequestError(message, "tools")
            return self._plain_job(engine.tokenizer, to_prompt(messages), params, options)
        return self._templated_job(engine.tokenizer, to_dicts(messages), params, options)

    def _text_job(self, engine: Client, prompt: str, given: Mapping[str, Any]) -> _Job:
        given = dict(given)
        formatted = given.pop("formatted", False)
        if not isinstance(prompt, str):
            raise RequestError(f"prompt must be text, not {type(prompt).__name__}", "prompt")
        to_prompt = None if formatted else self.completion_to_prompt
        own = to_prompt is default_completion_to_prompt
        if not own or not engine.tokenizer.has_chat_template:
            text = prompt if to_prompt is None else to_prompt(prompt)
            options = self._options(given, PLAIN)
            return self._plain_job(engine.tokenizer, text, self.sampling_params(given), options)
        options = self._options(given, TEMPLATED)
        user = [{"role": "user", "content": prompt}]
        return self._templated_job(engine.tokenizer, user, self.sampling_params(given), options)

    def _options(self, given: Mapping[str, Any], allowed: frozenset[str]) -> CallOptions:
        standing = {name: value for name, value in self.additional_kwargs.items() if name in allowed}
        return call_options({**standing, **given}, allowed)

    def _templated_job(
        self, tokenizer: Tokenizer, messages: list[dict[str, Any]], params: SamplingParams, options: CallOptions
    ) -> _Job:
        plan = plan_chat(
            tokenizer, messages, params, tools=options.tools, tool_choice=options.tool_choice,
            parallel_tool_calls=options.parallel_tool_calls, json_schema=options.json_schema,
            json_object=options.json_object, chat_template=options.chat_template,
            chat_template_kwargs=options.chat_template_kwargs,
        )  # fmt: skip
        return _Job(plan.prompt, plan.params, options.priority, Answer(self.model, plan.parser(), tokenizer))

    def _plain_job(self, tokenizer: Tokenizer, text: str, params: SamplingParams, options: CallOptions) -> _Job:
        if options.json_schema is not None or options.json_object:
            form = StructuredOutputsParams(json=options.json_schema, json_object=options.json_object or None)
            params = replace(params, structured_outputs=form)
        bos = tokenizer.named_special_tokens.get("bos_token")
        begun = bool(bos) and text.startswith(str(bos))  # as what a template rendered; a second one would be too many
        ids = tokenizer.encode(text, add_special_tokens=not begun)
        answer = Answer(self.model, PlainParser(), tokenizer)
        return _Job({"prompt_token_ids": ids}, params, options.priority, answer)


def _responses(
    stream: TokenStream, answer: Answer, show: Callable[[Answer, StreamPiece], Any]
) -> Generator[Any, None, None]:
    for piece in stream:
        if answer.push(piece):
            yield show(answer, piece)


async def _async_responses(
    stream: AsyncTokenStream, answer: Answer, show: Callable[[Answer, StreamPiece], Any]
) -> AsyncGenerator[Any, None]:
    async for piece in stream:
        if answer.push(piece):
            yield show(answer, piece)
