"""`ChatOctavo`: conversations, tools and structured output for LangChain, on an engine in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal
from uuid import uuid4

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.utils import LC_ID_PREFIX
from octavo.chat import ChatPlan
from octavo.client import Client
from octavo.errors import RequestError
from octavo.outputs import RequestOutput
from pydantic import Field

from langchain_octavo.batching import AllAtOnce, generate_all
from langchain_octavo.calls import AsyncRunning, Running, arun, checked_piece, run
from langchain_octavo.chunks import Answer, Blocks, generation
from langchain_octavo.engines import EngineFields
from langchain_octavo.events import Event, Events
from langchain_octavo.leaving import LeavableStreams
from langchain_octavo.planning import Asked, ask, plan
from langchain_octavo.results import combined, llm_output
from langchain_octavo.sampling import SamplingFields
from langchain_octavo.structured import structured_output
from langchain_octavo.tools import tool_choice_of, tools_as_openai


class ChatOctavo(AllAtOnce, LeavableStreams, EngineFields, SamplingFields, BaseChatModel):
    """A chat model in this process.

    >>> chat = ChatOctavo("Qwen/Qwen3-0.6B", temperature=0.7, max_model_len=4096)       # doctest: +SKIP
    >>> chat.invoke("Name a colour.", max_tokens=20, seed=1)                            # doctest: +SKIP

    The fields are those of `SamplingFields` and `EngineFields`, and LangChain's own; engine settings
    (`EngineConfig`) may be given by name. Sampling parameters can be given in each call, `model` too: then another
    engine with the same settings answers. Nothing is loaded before the first call; `close()`, or dropping the object,
    lets go of the engine.

    Raises `ConfigError` or `RequestError` (both `ValueError`s, `field` names the argument) for what cannot be: at
    construction where it can be known then, else in the call, before any work.
    """

    streaming: bool = False
    """Report tokens to callbacks in `invoke` and its like too."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for one answer. Then the request is ended and `TimeoutError` is raised."""
    chat_template: str | None = None
    """Jinja source to use instead of the model's own template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables for the template, such as {"enable_thinking": False}."""

    def _check(self) -> None:
        super()._check()
        self._sampling(None, {}, None)

    # ---------------------------------------------------------------- what LangChain asks about it

    @property
    def _llm_type(self) -> str:
        return "octavo-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        given = {name: value for name, value in self._given_sampling().items() if name != "stop"}
        others = {"chat_template": self.chat_template, "chat_template_kwargs": self.chat_template_kwargs}
        kept = {name: value for name, value in others.items() if value is not None}
        return {"model": self.model, **given, "stop": self.stop, **kept, **self.engine_kwargs}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_octavo", "chat_models"]

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "octavo"
        own = [self.stop] if isinstance(self.stop, str) else self.stop
        if own and not stop:
            params["ls_stop"] = own
        return params

    def _resolve_model_profile(self) -> ModelProfile:
        return {
            "name": self.model, "open_weights": True, "text_inputs": True, "text_outputs": True, "image_inputs": False,
            "audio_inputs": False, "video_inputs": False, "pdf_inputs": False, "image_outputs": False,
            "audio_outputs": False, "video_outputs": False, "tool_calling": True, "tool_choice": True,
            "tool_call_streaming": True, "structured_output": True, "temperature": True, "attachment": False,
        }  # fmt: skip

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return combined(llm_outputs)

    # ---------------------------------------------------------------- one call

    def _plan(self, client: Client, messages: Sequence[BaseMessage], asked: Asked) -> ChatPlan:
        if self.profile is not None and "max_input_tokens" not in self.profile and asked.model == self.model:
            self.profile["max_input_tokens"] = client.engine.limits.max_model_len  # known now that it is loaded
        return plan(client, messages, asked, self._sampling(asked.stop, asked.sampling, client))

    def _result(self, client: Client, chat: ChatPlan, asked: Asked, output: RequestOutput) -> ChatResult:
        found = [generation(_answer(client, chat, asked, output), choice) for choice in output.outputs]
        return ChatResult(generations=found, llm_output=llm_output(asked.model, [output.metrics]))

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        asked = ask(self, stop, kwargs)
        llm = self._shared(asked.model).llm
        chat = self._plan(llm, messages, asked)
        return self._result(llm, chat, asked, run(llm, [(chat.prompt, chat.params)], asked.timeout)[0])

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        asked = ask(self, stop, kwargs)
        llm = await self._shared(asked.model).start()
        chat = self._plan(llm, messages, asked)
        return self._result(llm, chat, asked, (await arun(llm, [(chat.prompt, chat.params)], asked.timeout))[0])

    # ---------------------------------------------------------------- streams

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:  # fmt: skip
        # `run_manager` stays silent: whoever calls this reports the chunks
        asked = ask(self, stop, kwargs)
        llm = self._shared(asked.model).llm
        chat = _streamable(self._plan(llm, messages, asked))
        running = Running(llm, [(chat.prompt, chat.params)], asked.timeout)
        answer = _answer(llm, chat, asked, running.outputs()[0])
        blocks = Blocks() if self.output_version == "v1" else None
        with closing(running):
            for _, piece in running:
                deltas = answer.deltas(checked_piece(piece))
                yield answer.chunk(piece, deltas) if blocks is None else answer.block_chunk(piece, deltas, blocks)

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:  # fmt: skip
        asked = ask(self, stop, kwargs)
        llm = await self._shared(asked.model).start()
        chat = _streamable(self._plan(llm, messages, asked))
        running = await AsyncRunning.begin(llm, (chat.prompt, chat.params), asked.timeout)
        answer = _answer(llm, chat, asked, running.output())
        blocks = Blocks() if self.output_version == "v1" else None
        with closing(running):
            async for piece in running:
                deltas = answer.deltas(checked_piece(piece))
                yield answer.chunk(piece, deltas) if blocks is None else answer.block_chunk(piece, deltas, blocks)

    def _stream_chat_model_events(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> Iterator[Event]:  # fmt: skip
        """LangChain's event protocol, natively. On this path nobody else reports tokens to callbacks."""
        asked = ask(self, stop, kwargs)
        llm = self._shared(asked.model).llm
        chat = _streamable(self._plan(llm, messages, asked))
        running = Running(llm, [(chat.prompt, chat.params)], asked.timeout)
        answer = _answer(llm, chat, asked, running.outputs()[0])
        events = Events(answer, _message_id(run_manager))
        yield events.start()
        with closing(running):
            for _, piece in running:
                deltas = answer.deltas(checked_piece(piece))
                if run_manager is not None and run_manager.handlers:
                    chunk = answer.chunk(piece, deltas)
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield from events.of(piece, deltas)

    async def _astream_chat_model_events(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> AsyncIterator[Event]:  # fmt: skip
        """The same for asyncio."""
        asked = ask(self, stop, kwargs)
        llm = await self._shared(asked.model).start()
        chat = _streamable(self._plan(llm, messages, asked))
        running = await AsyncRunning.begin(llm, (chat.prompt, chat.params), asked.timeout)
        answer = _answer(llm, chat, asked, running.output())
        events = Events(answer, _message_id(run_manager))
        yield events.start()
        with closing(running):
            async for piece in running:
                deltas = answer.deltas(checked_piece(piece))
                if run_manager is not None and run_manager.handlers:
                    chunk = answer.chunk(piece, deltas)
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                for event in events.of(piece, deltas):
                    yield event

    def _one_output(self, kwargs: dict[str, Any]) -> bool:
        asked = {name: kwargs.get(name) or getattr(self, name) or 1 for name in ("n", "best_of")}
        searches = kwargs.get("use_beam_search") or self.use_beam_search
        return (asked["n"] if searches else max(asked.values())) == 1

    def _should_stream(self, *, async_api: bool, run_manager: Any = None, **kwargs: Any) -> bool:
        # several outputs cannot be streamed, but callbacks that would like tokens must not make `invoke` fail
        if not kwargs.get("stream") and not self._one_output(kwargs):
            return False
        return super()._should_stream(async_api=async_api, run_manager=run_manager, **kwargs)

    def _should_use_protocol_streaming(self, *, async_api: bool, run_manager: Any = None, **kwargs: Any) -> bool:
        return self._one_output(kwargs) and super()._should_use_protocol_streaming(
            async_api=async_api, run_manager=run_manager, **kwargs
        )

    # ---------------------------------------------------------------- several at once

    def generate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Any = None, *,
        run_id: Any = None, **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        """Answer all conversations in one batch of the engine. `run_id` is that of the first."""
        if len(messages) < 2:
            return super().generate(messages, stop, callbacks, run_id=run_id, **kwargs)
        generate = super().generate

        def one(conversation: list[BaseMessage], first: bool) -> LLMResult:
            return generate([conversation], stop, callbacks, run_id=run_id if first else None, **kwargs)

        results = generate_all(one, messages)
        runs = [run for result in results for run in result.run or []]
        output = self._combine_llm_outputs([result.llm_output for result in results])
        return LLMResult(generations=[result.generations[0] for result in results], llm_output=output, run=runs or None)

    # ---------------------------------------------------------------- tools and structured output

    def bind_tools(
        self, tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool], *,
        tool_choice: dict[str, Any] | str | bool | None = None, strict: bool | None = None,
        parallel_tool_calls: bool | None = None, **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:  # fmt: skip
        """Let the model call `tools`.

        tool_choice: "auto" (the model decides; also None and False), "any" or "required" (also True), "none", the name
        of a tool, or OpenAI's dict that names one. A grammar enforces it, and the schema of each tool's arguments.
        strict: False allows arguments that a tool's schema does not name. parallel_tool_calls: False for at most one
        call in an answer.

        Raises `RequestError` (field "tools" or "tool_choice") for a tool without a sound schema or a name that no tool
        has.
        """
        found = tools_as_openai(tools, strict=strict)
        bound: dict[str, Any] = {"tools": found, **kwargs}
        choice = tool_choice_of(tool_choice, found)
        if choice is not None:
            bound["tool_choice"] = choice
        if parallel_tool_calls is not None:
            bound["parallel_tool_calls"] = parallel_tool_calls
        return self.bind(**bound)

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema", include_raw: bool = False,
        strict: bool | None = None, **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:  # fmt: skip
        """Answers of the form `schema`: a Pydantic class, a TypedDict class, a JSON schema or an OpenAI function.

        A grammar enforces the schema token by token, by each of the methods, so that the answer always validates.
        "json_schema" makes the answer's text so, "function_calling" the arguments of a tool that the model must call,
        "json_mode" the text too; without a `schema` it is any JSON object. strict: False allows keys that the schema
        does not name. include_raw: give {"raw", "parsed", "parsing_error"}.

        Raises `RequestError` (field "schema") for a schema that is none, "method" for an unknown one.
        """
        return structured_output(self, schema, method, include_raw=include_raw, strict=strict, kwargs=kwargs)

    # ---------------------------------------------------------------- counting

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of the prompt that these messages become, by the model's template and tokenizer, tools too."""
        asked = ask(self, None, {"tools": tools_as_openai(tools)} if tools else {})
        llm = self._shared().llm
        return len(self._plan(llm, messages, asked).prompt["prompt_token_ids"])


def _streamable(chat: ChatPlan) -> ChatPlan:
    if chat.params.choices > 1:
        name = "n" if chat.params.n > 1 else "best_of"
        raise RequestError(f"{name} above 1 cannot be streamed: leave it out, or use invoke or generate", name)
    return chat


def _answer(client: Client, chat: ChatPlan, asked: Asked, output: RequestOutput) -> Answer:
    """One of the request that `output` belongs to."""
    return Answer(chat.parser(), client.tokenizer, asked.model, output.metrics)


def _message_id(run_manager: Any) -> str:
    """As LangChain names messages, by their run."""
    return f"{LC_ID_PREFIX}-{run_manager.run_id if run_manager is not None else uuid4()}"
