"""Streams of `ChatOctavo`: one callback for each token on every path, the event protocol, and requests that end with
whoever asked."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers._streaming import _StreamingCallbackHandler, _V2StreamingCallbackHandler
from langchain_octavo import ChatOctavo, OctavoLLM
from langchain_recorder import AsyncRecorder, Recorder, at_rest
from langchain_tests.utils.stream_lifecycle import assert_valid_event_stream
from octavo.errors import RequestError

TOKENS = 24
SETTINGS: dict[str, Any] = {"dtype": "float32", "num_blocks": 129, "temperature": 0, "ignore_eos": True}
pytestmark = pytest.mark.filterwarnings("ignore:.*is in beta")


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Iterator[ChatOctavo]:
    chat = ChatOctavo(str(tiny_model), max_tokens=TOKENS, **SETTINGS)
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def text(chat: ChatOctavo) -> str:
    return str(chat.invoke("Hello").content)


class Streaming(Recorder, _StreamingCallbackHandler[Any]):
    """Makes `invoke` stream, as `astream_events` does."""

    def tap_output_aiter(self, run_id: Any, output: AsyncIterator[Any]) -> AsyncIterator[Any]:
        return output

    def tap_output_iter(self, run_id: Any, output: Iterator[Any]) -> Iterator[Any]:
        return output


class Protocol(Recorder, _V2StreamingCallbackHandler):
    """Makes `invoke` stream by the event protocol, as LangGraph does."""


def with_callbacks(handler: BaseCallbackHandler) -> dict[str, Any]:
    return {"callbacks": [handler]}


async def by_astream(chat: ChatOctavo, config: Any) -> None:
    async for _ in chat.astream("Hello", config):
        pass


async def by_events(chat: ChatOctavo, config: Any, version: Any) -> None:
    async for _ in chat.astream_events("Hello", config, version=version):
        pass


async def by_protocol(chat: ChatOctavo, config: Any) -> None:
    stream = await chat.astream_events("Hello", config, version="v3")
    assert [event async for event in stream]
    await stream._producer_task  # the end is reported after the last event


PATHS: dict[str, Callable[[ChatOctavo, Any], Any]] = {
    "stream": lambda chat, config: list(chat.stream("Hello", config)),
    "astream": lambda chat, config: asyncio.run(by_astream(chat, config)),
    "events v1": lambda chat, config: asyncio.run(by_events(chat, config, "v1")),
    "events v2": lambda chat, config: asyncio.run(by_events(chat, config, "v2")),
    "stream events v3": lambda chat, config: list(chat.stream_events("Hello", config, version="v3")),
    "events v3": lambda chat, config: asyncio.run(by_protocol(chat, config)),
    "invoke, stream=True": lambda chat, config: chat.invoke("Hello", config, stream=True),
    "ainvoke, stream=True": lambda chat, config: asyncio.run(chat.ainvoke("Hello", config, stream=True)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("handler", [Recorder, AsyncRecorder])
def test_each_token_is_reported_once(chat: ChatOctavo, text: str, path: str, handler: Any) -> None:
    heard = handler()
    PATHS[path](chat, with_callbacks(heard))
    recorder = heard.inner if isinstance(heard, AsyncRecorder) else heard
    assert recorder.counts == {"start": 1, "token": TOKENS, "end": 1}
    (tokens,) = recorder.tokens.values()
    assert "".join(tokens) == text


@pytest.mark.parametrize("handler", [Streaming, Protocol])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_handlers_that_stream_make_invoke_stream(chat: ChatOctavo, text: str, handler: Any, asynchronous: bool) -> None:
    heard = handler()
    config = with_callbacks(heard)
    message = asyncio.run(chat.ainvoke("Hello", config)) if asynchronous else chat.invoke("Hello", config)
    assert message.text == text
    assert heard.counts == {"start": 1, "token": TOKENS, "end": 1}
    if handler is Protocol:
        assert_valid_event_stream(heard.events)
    several = handler()
    found = chat.invoke("Hello", with_callbacks(several), n=2)
    assert (found.text, several.counts) == (text, {"start": 1, "end": 1}), "several outputs cannot be streamed"


def test_a_model_told_to_stream_reports_tokens_in_invoke(tiny_model: Path, chat: ChatOctavo, text: str) -> None:
    streaming = ChatOctavo(str(tiny_model), max_tokens=TOKENS, streaming=True, **SETTINGS)
    heard = Recorder()
    assert streaming.invoke("Hello", with_callbacks(heard)).content == text
    assert heard.counts["token"] == TOKENS
    plain = Recorder()
    chat.invoke("Hello", with_callbacks(plain))
    assert plain.counts == {"start": 1, "end": 1}


async def test_events_of_a_chain_have_each_chunk_once(chat: ChatOctavo, text: str) -> None:
    async def ask(question: str) -> str:
        return str((await chat.ainvoke(question)).text)

    chunks = [
        event["data"]["chunk"]
        async for event in RunnableLambda(ask).astream_events("Hello", version="v2")
        if event["event"] == "on_chat_model_stream"
    ]
    assert "".join(chunk.text for chunk in chunks) == text
    assert len(chunks) == TOKENS


# -- what a stream carries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_the_sum_of_the_chunks_is_the_message(tiny_model: Path, version: str) -> None:
    chat = ChatOctavo(str(tiny_model), max_tokens=TOKENS, output_version=version, logprobs=2, **SETTINGS)
    chat.invoke("Hello")
    whole = chat.invoke("Hello")
    chunks = list(chat.stream("Hello"))
    assert all(chunk.usage_metadata is None for chunk in chunks[:-1])
    assert [chunk.chunk_position for chunk in chunks] == [None] * (TOKENS - 1) + ["last"]
    total: AIMessageChunk = sum(chunks[1:], chunks[0])  # type: ignore[assignment]
    assert total.text == whole.text
    assert total.usage_metadata == whole.usage_metadata
    assert [block["type"] for block in total.content_blocks] == ["text"]
    assert total.response_metadata["logprobs"] == whole.response_metadata["logprobs"]
    assert len(whole.response_metadata["logprobs"]["content"]) == TOKENS
    for key in ("model_name", "model_provider", "finish_reason"):
        assert total.response_metadata[key] == whole.response_metadata[key]
    assert total.response_metadata["time_to_first_token"] > 0
    assert total.response_metadata["tokens_per_second"] > 0


def test_the_protocol_gives_the_same_message(chat: ChatOctavo, text: str) -> None:
    stream = chat.stream_events("Hello", version="v3", logprobs=1)
    events = list(stream)
    assert_valid_event_stream(events)
    deltas = [event["delta"]["text"] for event in events if event["event"] == "content-block-delta"]
    message: AIMessage = stream.output
    assert "".join(deltas) == message.text == str(stream.text) == text
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == TOKENS
    assert message.response_metadata["finish_reason"] == "length"
    assert message.response_metadata["model_name"] == chat.model
    assert len(message.response_metadata["logprobs"]["content"]) == TOKENS


def test_what_cannot_be_streamed_is_refused(chat: ChatOctavo) -> None:
    for name in ("n", "best_of"):
        with pytest.raises(RequestError) as raised:
            list(chat.stream("Hello", **{name: 2}))
        assert raised.value.field == name


# -- leaving ---------------------------------------------------------------------------------------------------------

LONG = {"max_tokens": 400}


def rests_within_two_steps(chat: ChatOctavo | OctavoLLM, before: int) -> None:
    stats = chat.stats()
    assert at_rest(stats)
    assert stats.steps - before <= 2


def test_leaving_a_stream_ends_its_request(chat: ChatOctavo) -> None:
    for number, _ in enumerate(chat.stream("Hello", **LONG)):
        if number == 3:
            break
    rests_within_two_steps(chat, chat.stats().steps)
    stream = chat.stream("Hello", **LONG)
    next(stream)
    stream.close()
    rests_within_two_steps(chat, chat.stats().steps)


def test_a_handler_that_keeps_the_error_does_not_keep_the_request(chat: ChatOctavo) -> None:
    class Keeper(BaseCallbackHandler):
        kept: list[BaseException] = []  # noqa: RUF012

        def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
            self.kept.append(error)

    keeper = Keeper()
    stream = chat.stream("Hello", with_callbacks(keeper), **LONG)
    next(stream)
    stream.close()
    rests_within_two_steps(chat, chat.stats().steps)
    assert keeper.kept


async def test_leaving_an_asynchronous_stream_ends_its_request(chat: ChatOctavo) -> None:
    async for _ in chat.astream("Hello", **LONG):
        break
    rests_within_two_steps(chat, chat.stats().steps)
    stream = chat.astream("Hello", **LONG)
    await anext(stream)
    await stream.aclose()
    rests_within_two_steps(chat, chat.stats().steps)


async def test_leaving_the_protocols_stream_ends_its_request(chat: ChatOctavo) -> None:
    async for _ in chat.astream_events("Hello", version="v2", **LONG):
        break
    stream = await chat.astream_events("Hello", version="v3", **LONG)
    async for event in stream:
        if event["event"] == "content-block-delta":
            break
    await stream.aclose()
    for _ in range(10):
        await asyncio.sleep(0)
    rests_within_two_steps(chat, chat.stats().steps)


@pytest.mark.parametrize("how", ["ainvoke", "astream", "abatch"])
async def test_cancelling_a_task_ends_its_requests(chat: ChatOctavo, how: str) -> None:
    async def ask() -> None:
        if how == "ainvoke":
            await chat.ainvoke("Hello", **LONG)
        elif how == "abatch":
            await chat.abatch(["Hello", "Hi", "Well"], **LONG)
        else:
            async for _ in chat.astream("Hello", **LONG):
                pass

    heard = chat.stats().steps
    task = asyncio.create_task(ask())
    async with asyncio.timeout(30):
        while chat.stats().steps < heard + 5:
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    rests_within_two_steps(chat, chat.stats().steps)


def test_a_time_limit_ends_the_request(chat: ChatOctavo) -> None:
    busy = {"max_tokens": None, "timeout": 0.05}
    with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
        chat.invoke("Hello", **busy)
    with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
        list(chat.stream("Hello", **busy))
    with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
        asyncio.run(chat.ainvoke("Hello", **busy))
    with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
        asyncio.run(by_astream(chat.model_copy(update={"timeout": 0.05, "max_tokens": None}), None))
    rests_within_two_steps(chat, chat.stats().steps)
    assert chat.invoke("Hello", timeout=60).content


def test_closing_ends_what_runs(tiny_model: Path) -> None:
    chat = ChatOctavo(str(tiny_model), max_tokens=400, max_queued_requests=77, **SETTINGS)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            chat.invoke("Hello")
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not chat.stats().running:
        time.sleep(0.001)
    chat.close()
    thread.join(30)
    assert [type(error).__name__ for error in errors] == ["EngineClosedError"]
