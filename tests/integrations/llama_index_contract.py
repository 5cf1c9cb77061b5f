"""`LLMContract`: what an LLM class of LlamaIndex owes its users, as tests to inherit. LlamaIndex itself has no such
suite.

Subclass it as `class TestMine(LLMContract)`, with a fixture `llm` (max_tokens 16 or so) and the flags below. Nothing is
asserted about words, so any model will do. `ToolContract` in the file beside this one goes on with tools and structured
output.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ImageBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.callbacks import CallbackManager, EventPayload
from llama_index.core.callbacks.token_counting import TokenCountingHandler
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index_recorder import recorded

USER = [ChatMessage(role="user", content="Name a colour.")]
PROMPT = "The capital of France is"


class LLMContract:
    """Text: shapes, streams, events, parameters, errors, cancellation, serialisation."""

    secret: str = ""
    """A credential that `llm` was made with; it must not show in what is written down."""

    @pytest.fixture
    def llm(self) -> FunctionCallingLLM:
        """A fresh object for each test; `max_tokens` small."""
        raise NotImplementedError

    def requests_open(self, llm: Any) -> int:
        """Requests that the backend works on for `llm` at this moment."""
        raise NotImplementedError

    # ---------------------------------------------------------------- shapes

    def test_metadata(self, llm: FunctionCallingLLM) -> None:
        metadata = llm.metadata
        assert isinstance(metadata, LLMMetadata)
        assert metadata.is_chat_model
        assert metadata.is_function_calling_model
        assert 0 < metadata.num_output <= metadata.context_window
        assert metadata.model_name != "unknown"

    def test_the_async_calls_are_coroutines_of_the_class_itself(self, llm: FunctionCallingLLM) -> None:
        for name in ("achat", "acomplete", "astream_chat", "astream_complete"):
            assert inspect.iscoroutinefunction(getattr(llm, name)), name

    def test_complete(self, llm: FunctionCallingLLM) -> None:
        check_completion(llm.complete(PROMPT))

    async def test_acomplete(self, llm: FunctionCallingLLM) -> None:
        check_completion(await llm.acomplete(PROMPT))

    def test_stream_complete(self, llm: FunctionCallingLLM) -> None:
        check_completion_stream(list(llm.stream_complete(PROMPT)))

    async def test_astream_complete(self, llm: FunctionCallingLLM) -> None:
        check_completion_stream([piece async for piece in await llm.astream_complete(PROMPT)])

    def test_chat(self, llm: FunctionCallingLLM) -> None:
        check_chat(llm.chat(USER))

    async def test_achat(self, llm: FunctionCallingLLM) -> None:
        check_chat(await llm.achat(USER))

    def test_stream_chat(self, llm: FunctionCallingLLM) -> None:
        check_chat_stream(list(llm.stream_chat(USER)))

    async def test_astream_chat(self, llm: FunctionCallingLLM) -> None:
        check_chat_stream([piece async for piece in await llm.astream_chat(USER)])

    def test_messages_and_prompt_by_keyword(self, llm: FunctionCallingLLM) -> None:
        check_chat(llm.chat(messages=USER))
        check_completion(llm.complete(prompt=PROMPT))

    def test_a_stream_that_has_ended_stays_empty(self, llm: FunctionCallingLLM) -> None:
        stream = llm.stream_chat(USER)
        assert list(stream)
        assert list(stream) == []

    # ---------------------------------------------------------------- what goes in

    def test_history(self, llm: FunctionCallingLLM) -> None:
        """A longer history is more prompt; nothing of it is dropped."""
        system = ChatMessage(role="system", content="You answer in one word.")
        history = [system, *USER, ChatMessage(role="assistant", content="Red."), ChatMessage(content="Another one?")]
        short, long = llm.chat([system, *USER]), llm.chat(history)
        assert usage(long)["prompt_tokens"] > usage(short)["prompt_tokens"]

    def test_roles_by_other_names_and_several_blocks(self, llm: FunctionCallingLLM) -> None:
        check_chat(llm.chat([
            ChatMessage(role=MessageRole.DEVELOPER, content="Be short."),
            ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="Name"), TextBlock(text="a colour.")]),
            ChatMessage(role=MessageRole.CHATBOT, blocks=[ThinkingBlock(content="Hm."), TextBlock(text="Red.")]),
            ChatMessage(role=MessageRole.USER, content="Another one."),
        ]))  # fmt: skip

    def test_messages_are_not_changed(self, llm: FunctionCallingLLM) -> None:
        messages = copy.deepcopy(USER)
        llm.chat(messages)
        assert messages == USER

    def test_formatted_goes_to_the_model_as_it_is(self, llm: FunctionCallingLLM) -> None:
        raw, wrapped = llm.complete(PROMPT, formatted=True), llm.complete(PROMPT)
        assert usage(raw)["prompt_tokens"] < usage(wrapped)["prompt_tokens"]

    def test_messages_to_prompt_is_the_template_that_chat_uses(self, llm: FunctionCallingLLM) -> None:
        text = llm.messages_to_prompt(USER)
        assert USER[0].content in text
        assert usage(llm.complete(text, formatted=True))["prompt_tokens"] == usage(llm.chat(USER))["prompt_tokens"]

    def test_predict_and_stream_send_the_template_and_the_system_prompt(self, llm: FunctionCallingLLM) -> None:
        template = PromptTemplate("Name a {thing}.")
        llm.system_prompt = "You answer in one word."
        with recorded(llm) as calls:
            assert isinstance(llm.predict(template, thing="colour"), str)
            assert all(isinstance(piece, str) for piece in llm.stream(template, thing="colour"))
        starts = calls.named("LLMChatStartEvent")
        assert [[message.content for message in start.messages] for start in starts] == [
            ["You answer in one word.", "Name a colour."]
        ] * 2

    async def test_apredict_and_astream(self, llm: FunctionCallingLLM) -> None:
        template = PromptTemplate("Name a {thing}.")
        assert isinstance(await llm.apredict(template, thing="colour"), str)
        assert all([isinstance(piece, str) async for piece in await llm.astream(template, thing="colour")])

    # ---------------------------------------------------------------- parameters

    def test_max_tokens_of_a_call_goes_before_that_of_the_object(self, llm: FunctionCallingLLM) -> None:
        response = llm.chat(USER, max_tokens=3)
        assert usage(response)["completion_tokens"] <= 3
        assert list(llm.stream_complete(PROMPT, max_tokens=3))[-1].raw["usage"]["completion_tokens"] <= 3

    def test_logprobs(self, llm: FunctionCallingLLM) -> None:
        whole = llm.chat(USER, logprobs=2)
        assert whole.logprobs is not None
        assert len(whole.logprobs) == usage(whole)["completion_tokens"]
        for token in whole.logprobs:
            assert 2 <= len(token) <= 3
            assert all(one.logprob <= 0 and bytes(one.bytes) is not None for one in token)
        pieces = list(llm.stream_complete(PROMPT, logprobs=1))
        assert sum(len(piece.logprobs or ()) for piece in pieces) == usage(pieces[-1])["completion_tokens"]

    def test_an_unknown_parameter_is_named(self, llm: FunctionCallingLLM) -> None:
        for call in (llm.chat, llm.stream_chat):
            with pytest.raises(ValueError, match="temprature"):
                call(USER, temprature=1)
        for call in (llm.complete, llm.stream_complete):
            with pytest.raises(ValueError, match="temprature"):
                call(PROMPT, temprature=1)
        check_chat(llm.chat(USER))

    async def test_an_unknown_parameter_is_named_by_the_async_calls(self, llm: FunctionCallingLLM) -> None:
        for call, asked in ((llm.achat, USER), (llm.astream_chat, USER)):
            with pytest.raises(ValueError, match="temprature"):
                await call(asked, temprature=1)
        for complete in (llm.acomplete, llm.astream_complete):
            with pytest.raises(ValueError, match="temprature"):
                await complete(PROMPT, temprature=1)

    def test_a_parameter_out_of_range_is_named(self, llm: FunctionCallingLLM) -> None:
        with pytest.raises(ValueError, match="top_p"):
            llm.chat(USER, top_p=7)
        with pytest.raises(ValueError, match="top_p"):
            type(llm)(top_p=7)

    # ---------------------------------------------------------------- bad input

    def test_bad_messages_are_named_and_the_next_call_is_served(self, llm: FunctionCallingLLM) -> None:
        picture = ChatMessage(blocks=[TextBlock(text="What is this?"), ImageBlock(image=b"iVBORw0KGgo=")])
        with pytest.raises(ValueError, match="empty"):
            llm.chat([])
        with pytest.raises(ValueError, match="image"):
            llm.chat([*USER, picture])
        with pytest.raises(ValueError, match="messages"):
            llm.chat("Name a colour.")  # type: ignore[arg-type]
        check_chat(llm.chat(USER))

    def test_a_prompt_over_the_context_is_refused_and_the_next_call_is_served(self, llm: FunctionCallingLLM) -> None:
        long = "word " * (llm.metadata.context_window + 100)
        with pytest.raises(ValueError, match="prompt"):
            llm.chat([ChatMessage(content=long)])
        with pytest.raises(ValueError, match="prompt"):
            llm.stream_complete(long)
        check_completion(llm.complete(PROMPT))

    # ---------------------------------------------------------------- events

    @pytest.mark.parametrize("method", ["chat", "achat", "stream_chat", "astream_chat"])
    async def test_chat_events_come_once(self, llm: FunctionCallingLLM, method: str) -> None:
        with recorded(llm) as calls:
            responses = await call(llm, method, USER)
        calls.expect("LLMChat", pieces=len(responses) if "stream" in method else 0, span=method)
        assert calls.named("LLMChatEndEvent")[0].response == responses[-1]
        assert calls.started[0][EventPayload.MESSAGES] == USER
        assert calls.ended[0][EventPayload.RESPONSE] == responses[-1]

    @pytest.mark.parametrize("method", ["complete", "acomplete", "stream_complete", "astream_complete"])
    async def test_completion_events_come_once(self, llm: FunctionCallingLLM, method: str) -> None:
        with recorded(llm) as calls:
            responses = await call(llm, method, PROMPT)
        calls.expect("LLMCompletion", pieces=len(responses) if "stream" in method else 0, span=method)
        assert calls.named("LLMCompletionEndEvent")[0].response == responses[-1]
        assert calls.started[0][EventPayload.PROMPT] == PROMPT
        assert calls.ended[0][EventPayload.COMPLETION] == responses[-1]

    @pytest.mark.parametrize("method", ["chat", "achat", "stream_chat", "astream_chat"])
    async def test_the_event_of_an_error_comes_once(self, llm: FunctionCallingLLM, method: str) -> None:
        with recorded(llm) as calls, pytest.raises(ValueError):
            await call(llm, method, USER, top_p=7)
        assert len(calls.started) == len(calls.ended) == 1
        assert isinstance(calls.ended[0][EventPayload.EXCEPTION], ValueError)

    def test_events_can_be_written_as_json_and_hold_no_secret(self, llm: FunctionCallingLLM) -> None:
        with recorded(llm) as calls:
            list(llm.stream_chat(USER))
            llm.complete(PROMPT)
        text = json.dumps([event.model_dump(mode="json") for event in calls.events])
        assert not self.secret or self.secret not in text

    def test_the_token_counter_finds_the_usage(self, llm: FunctionCallingLLM) -> None:
        counter = TokenCountingHandler(tokenizer=lambda text: [0] * 10_000)
        llm.callback_manager = CallbackManager([counter])
        response = llm.chat(USER)
        last = list(llm.stream_complete(PROMPT))[-1]
        both = [usage(response), usage(last)]
        assert counter.prompt_llm_token_count == sum(one["prompt_tokens"] for one in both)
        assert counter.completion_llm_token_count == sum(one["completion_tokens"] for one in both)

    # ---------------------------------------------------------------- leaving early

    @pytest.mark.parametrize("how", ["break", "close", "never started"])
    def test_leaving_a_stream_ends_its_request(self, llm: FunctionCallingLLM, how: str) -> None:
        with recorded(llm):  # keeps every event, and with them the frames of those that ended early
            for make in (lambda: llm.stream_chat(USER, **LONG), lambda: llm.stream_complete(PROMPT, **LONG)):
                stream = make()
                if how != "never started":
                    next(stream)
                    assert self.requests_open(llm) == 1
                if how == "close":
                    stream.close()
                else:
                    del stream
                self.expect_idle(llm)

    @pytest.mark.parametrize("how", ["break", "aclose", "never started", "cancel"])
    async def test_leaving_an_async_stream_ends_its_request(self, llm: FunctionCallingLLM, how: str) -> None:
        with recorded(llm):
            for make in (lambda: llm.astream_chat(USER, **LONG), lambda: llm.astream_complete(PROMPT, **LONG)):
                stream = await make()
                if how == "cancel":
                    await cancelled(drain(stream))
                elif how != "never started":
                    await anext(stream)
                    assert self.requests_open(llm) == 1
                if how == "aclose":
                    await stream.aclose()
                elif how != "cancel":
                    del stream
                self.expect_idle(llm)

    async def test_cancelling_a_task_ends_its_request(self, llm: FunctionCallingLLM) -> None:
        for make in (lambda: llm.achat(USER, **LONG), lambda: llm.acomplete(PROMPT, **LONG)):
            await cancelled(make())
            self.expect_idle(llm)

    def expect_idle(self, llm: Any) -> None:
        deadline = time.monotonic() + 10
        while self.requests_open(llm):
            assert time.monotonic() < deadline, "a request nobody listens to runs on"

    # ---------------------------------------------------------------- written down and copied

    def test_class_name(self, llm: FunctionCallingLLM) -> None:
        assert type(llm).class_name() not in ("", "base_component", "custom_llm")

    def test_to_dict_and_back(self, llm: FunctionCallingLLM) -> None:
        assert not self.secret or self.secret not in llm.to_json()
        again = type(llm).from_dict(llm.to_dict())
        assert again.to_dict() == llm.to_dict()
        assert type(llm).from_json(llm.to_json()).to_dict() == llm.to_dict()
        check_chat(again.chat(USER))

    def test_copies_answer_too(self, llm: FunctionCallingLLM) -> None:
        llm.chat(USER)
        for again in (copy.copy(llm), copy.deepcopy(llm), pickle.loads(pickle.dumps(llm)), llm.model_copy()):
            assert again.to_dict() == llm.to_dict()
            check_chat(again.chat(USER, max_tokens=2))

    # ---------------------------------------------------------------- at once

    async def test_async_calls_run_at_once(self, llm: FunctionCallingLLM) -> None:
        """While one stream is held, others begin and end."""
        held = await llm.astream_chat(USER, **LONG)
        await anext(held)
        for response in await asyncio.gather(*(llm.achat(USER, max_tokens=2) for _ in range(4))):
            check_chat(response)
        await held.aclose()


LONG = {"max_tokens": 4000, "min_tokens": 4000}
"""Of a request that does not end while a test looks."""


async def call(llm: FunctionCallingLLM, method: str, asked: Any, **kwargs: Any) -> list[Any]:
    """All responses of any of the eight calls."""
    made: Callable[..., Any] = getattr(llm, method)
    result = made(asked, **kwargs)
    if method.startswith("a"):
        result = await result
        return [piece async for piece in result] if "stream" in method else [result]
    return list(result) if "stream" in method else [result]


async def drain(stream: Any) -> None:
    async for _ in stream:
        pass


async def cancelled(work: Any) -> None:
    """Start `work`, cancel it when it runs, wait until it is gone."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def usage(response: ChatResponse | CompletionResponse) -> dict[str, int]:
    found: dict[str, int] = response.raw["usage"]
    return found


def check_usage(response: ChatResponse | CompletionResponse) -> None:
    counts = usage(response)
    assert counts["prompt_tokens"] > 0
    assert counts["completion_tokens"] > 0
    assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
    assert response.additional_kwargs["prompt_tokens"] == counts["prompt_tokens"]
    assert response.additional_kwargs["completion_tokens"] == counts["completion_tokens"]


def check_completion(response: CompletionResponse) -> None:
    assert isinstance(response, CompletionResponse)
    assert isinstance(response.text, str)
    check_usage(response)


def check_chat(response: ChatResponse) -> None:
    assert isinstance(response, ChatResponse)
    assert response.message.role == MessageRole.ASSISTANT
    assert isinstance(response.message.content, str)
    check_usage(response)


def check_completion_stream(pieces: list[CompletionResponse]) -> None:
    assert len(pieces) > 1
    check_completion(pieces[-1])
    said = ""
    for piece in pieces:
        said += piece.delta or ""
        assert piece.text == said


def check_chat_stream(pieces: list[ChatResponse]) -> None:
    assert len(pieces) > 1
    check_chat(pieces[-1])
    said = ""
    for piece in pieces:
        said += piece.delta or ""
        assert (piece.message.content or "") == said
