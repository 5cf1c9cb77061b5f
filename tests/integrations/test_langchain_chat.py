"""`ChatOctavo`: what an answer carries, parameters, one engine for many objects, counting, caching, serialisation, and
errors that name what was wrong and leave the engine to the next call."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumps, loads
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField
from langchain_octavo import ChatOctavo, OctavoLLM
from langchain_octavo.messages import to_openai
from langchain_octavo.sampling import SamplingFields
from langchain_recorder import Recorder, at_rest
from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.engine import registry
from octavo.errors import ConfigError, EngineClosedError, ModelNotFoundError, RequestError

QUESTION = "Name three colours."
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatOctavo]:
    chat = ChatOctavo(temperature=0, max_tokens=16)
    yield chat
    chat.close()


# -- an answer -------------------------------------------------------------------------------------------------------


def test_it_says_what_llm_says(chat: ChatOctavo) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=7, max_tokens=16, repetition_penalty=1.1)
    with LLM() as llm:
        expected = llm.chat(MESSAGES, params)[0]
    options = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 7, "repetition_penalty": 1.1}
    message = chat.invoke(QUESTION, **options)
    assert message.content == expected.outputs[0].text
    assert ChatOctavo(max_tokens=16, **options).invoke(QUESTION).content == message.content
    assert asyncio.run(chat.ainvoke(QUESTION, **options)).content == message.content
    assert chat.bind(**options).invoke(QUESTION).content == message.content


def test_usage_and_metadata(chat: ChatOctavo) -> None:
    long = "Repeat: " + "one two three four five six seven " * 20
    first, second = chat.invoke(long), chat.invoke(long)
    assert first.usage_metadata is not None
    assert second.usage_metadata is not None
    assert first.usage_metadata["output_tokens"] == 16
    assert first.usage_metadata["total_tokens"] == first.usage_metadata["input_tokens"] + 16
    assert first.usage_metadata["input_tokens"] == chat.get_num_tokens_from_messages([HumanMessage(long)])
    assert second.usage_metadata["input_token_details"]["cache_read"] >= 96, "the prefix cache had the prompt"
    metadata = second.response_metadata
    assert metadata["model_name"] == chat.model
    assert metadata["model_provider"] == "octavo"
    assert metadata["finish_reason"] == "length"
    assert metadata["time_to_first_token"] > 0
    assert metadata["tokens_per_second"] > 0
    assert str(second.id).startswith("lc_run-")


def test_stop_strings_and_reasons(chat: ChatOctavo) -> None:
    whole = str(chat.invoke(QUESTION).content)
    stop = whole[5:7]
    message = chat.invoke(QUESTION, stop=[stop])
    assert message.content == whole[: whole.index(stop)]
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["stop_reason"] == stop
    own = ChatOctavo(temperature=0, max_tokens=16, stop=stop)
    assert own.invoke(QUESTION).content == message.content
    assert own.invoke(QUESTION, stop=[]).content == whole, "what the call says wins"


def test_several_outputs(chat: ChatOctavo) -> None:
    result = chat.generate([[HumanMessage(QUESTION)]], n=3, temperature=1.0, seed=3, ignore_eos=True)
    (choices,) = result.generations
    assert len({choice.text for choice in choices}) == 3
    assert all(choice.message.usage_metadata["output_tokens"] == 48 for choice in choices)  # type: ignore[union-attr]
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["completion_tokens"] == 48
    best = chat.generate([[HumanMessage(QUESTION)]], best_of=3, temperature=1.0, seed=3, ignore_eos=True).generations[0]
    assert len(best) == 1
    assert best[0].text in {choice.text for choice in choices}


def test_log_probabilities(chat: ChatOctavo) -> None:
    tokens = chat.invoke(QUESTION, logprobs=3).response_metadata["logprobs"]["content"]
    assert len(tokens) == 16
    for token in tokens:
        assert token["logprob"] <= 0
        assert token["top_logprobs"][0]["logprob"] == token["logprob"], "greedy takes the most likely"
        assert bytes(token["bytes"]).decode("utf-8", "replace") == token["token"]


def test_every_sampling_parameter_is_a_field_and_an_argument(chat: ChatOctavo) -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert set(SamplingFields.model_fields) == names
    values: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "n": 2, "best_of": 3, "max_tokens": 9,
        "min_tokens": 2, "stop": ["x"], "stop_token_ids": [3], "include_stop_str_in_output": True, "ignore_eos": True,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {5: 1.0},
        "bad_words": ["y"], "allowed_token_ids": [5, 6, 7], "logprobs": 1, "prompt_logprobs": 1, "seed": 4,
        "structured_outputs": StructuredOutputsParams(regex="[ab]+"), "skip_special_tokens": False, "detokenize": True,
        "no_repeat_ngram_size": 3, "use_beam_search": False,
    }  # fmt: skip
    search = {"use_beam_search": True, "beam_width": 5, "length_penalty": 0.5, "early_stopping": "never"}
    assert {*values, *search} == names
    found = SamplingParams(max_tokens=None, **search)
    assert ChatOctavo(**search)._sampling(None, {}, None) == chat._sampling(None, search | {"max_tokens": None}, None)
    assert ChatOctavo(**search)._sampling(None, {}, None) == found
    expected = SamplingParams(**values)
    assert ChatOctavo(**values)._sampling(None, {}, None) == expected
    assert chat._sampling(None, values, None) == expected
    assert ChatOctavo()._sampling(None, {}, None).max_tokens is None, "up to the model's length"


def test_beam_search_and_its_stream(chat: ChatOctavo) -> None:
    """Also where somebody listens for tokens, and beside a temperature that the model's own files give."""
    search: dict[str, Any] = {"use_beam_search": True, "best_of": 3, "max_tokens": 14, "temperature": 1.0}
    with LLM() as llm:
        params = SamplingParams(use_beam_search=True, beam_width=3, max_tokens=14)
        expected = llm.chat([{"role": "user", "content": QUESTION}], params)[0].text
    assert chat.invoke(QUESTION, **search).content == expected
    chunks = [chunk.content for chunk in chat.stream(QUESTION, **search)]
    assert "".join(map(str, chunks)) == expected
    with pytest.raises(RequestError, match="n above 1"):
        list(chat.stream(QUESTION, **search, n=2))


def test_the_models_own_defaults_count_where_nothing_is_given(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    own = {"temperature": 0.25, "top_k": 7, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    chat = ChatOctavo(str(tmp_path), dtype="float32", num_blocks=33, top_k=3)
    params = chat._sampling(None, {"top_p": 0.5}, chat._shared().llm)
    assert (params.temperature, params.top_k, params.top_p) == (0.25, 3, 0.5)
    chat.close()


# -- messages --------------------------------------------------------------------------------------------------------


def test_messages_become_those_of_a_template() -> None:
    messages: list[BaseMessage] = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "Hello, "}, "you"], name="ada"),
        AIMessage(
            [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Wait."},
             {"type": "tool_call", "id": "1", "name": "f", "args": {"a": 1}}],
            tool_calls=[{"id": "1", "name": "f", "args": {"a": "ü"}}],
            invalid_tool_calls=[{"id": "2", "name": "g", "args": '{"a"', "error": None}],
        ),
        ToolMessage([{"type": "text", "text": "42"}], tool_call_id="1", name="f", status="error"),
        AIMessage("", additional_kwargs={"reasoning_content": "so"}),
        ChatMessage("aside", role="critic"),
    ]  # fmt: skip
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "g", "arguments": '{"a"'}}
    assert to_openai(messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, you", "name": "ada"},
        {"role": "assistant", "content": "Wait.", "reasoning_content": "hm", "tool_calls": [call, broken]},
        {"role": "tool", "content": "42", "name": "f", "tool_call_id": "1"},
        {"role": "assistant", "content": "", "reasoning_content": "so"},
        {"role": "critic", "content": "aside"},
    ]


@pytest.mark.parametrize(
    "block",
    [{"type": "image", "url": "http://x/y.png"}, {"type": "audio", "base64": "AA", "mime_type": "audio/wav"},
     {"type": "image_url", "image_url": {"url": "x"}}, {"type": "file", "file_id": "7"}, {"type": "video", "url": "x"}],
)  # fmt: skip
def test_what_is_no_text_is_refused(chat: ChatOctavo, block: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=rf"messages\[0\].*{block['type']}") as raised:
        chat.invoke([HumanMessage([{"type": "text", "text": "See: "}, block])])
    assert raised.value.field == "messages"


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "arguments"),
    [
        (ConfigError, "temprature", {"temprature": 1}),
        (ConfigError, "frequency", {"frequency": 1}),
        (RequestError, "temperature", {"temperature": -1}),
        (RequestError, "top_k", {"top_k": "many"}),
        (RequestError, "timeout", {"timeout": 0}),
        (RequestError, "tools", {"tools": [{"type": "web_search"}]}),
        (RequestError, "tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}),
        (RequestError, "parallel_tool_calls", {"tools": [], "parallel_tool_calls": 3}),
        (RequestError, "response_format", {"response_format": {"type": "xml"}}),
        (RequestError, "chat_template", {"chat_template": "{% for %}"}),
    ],
)
def test_a_bad_argument_is_named_and_the_next_call_served(
    chat: ChatOctavo, kind: type[Exception], field: str, arguments: dict[str, Any]
) -> None:
    for attempt in (
        lambda: chat.invoke(QUESTION, **arguments),
        lambda: list(chat.stream(QUESTION, **arguments)),
        lambda: asyncio.run(chat.ainvoke(QUESTION, **arguments)),
    ):
        with pytest.raises(kind) as raised:
            attempt()
        assert raised.value.field == field  # type: ignore[attr-defined]
    assert chat.invoke(QUESTION).content
    assert at_rest(chat.stats())


def test_bad_conversations_are_named_and_the_next_call_served(chat: ChatOctavo) -> None:
    recorder = Recorder()
    for messages, field, words in (
        ([], "messages", "at least one message"),
        ([RemoveMessage(id="1")], "messages", "RemoveMessage"),
        ([HumanMessage("word " * 9000)], "prompt", "8192"),
    ):
        with pytest.raises(RequestError, match=words) as raised:
            chat.invoke(messages, {"callbacks": [recorder]})
        assert raised.value.field == field
    assert recorder.counts["error"] == 3
    assert chat.invoke(QUESTION).content


def test_bad_settings_are_named_at_construction() -> None:
    for kind, field, settings in (
        (ConfigError, "temprature", {"temprature": 1}),
        (ConfigError, "tensor_parallel_size", {"tensor_parallel_size": 2}),
        (ConfigError, "dtype", {"dtype": "int3"}),
        (ConfigError, "dtype", {"dtype": "float32", "engine_kwargs": {"dtype": "bfloat16"}}),
        (RequestError, "top_p", {"top_p": 2.0}),
        (RequestError, "best_of", {"n": 3, "best_of": 2}),
    ):
        with pytest.raises(kind) as raised:
            ChatOctavo(**settings)
        assert raised.value.field == field
    with pytest.raises(ValueError, match="temperature"):
        ChatOctavo(temperature="warm")
    with pytest.raises(ModelNotFoundError):
        ChatOctavo("/no/such/model").invoke("Hello")


# -- one engine ------------------------------------------------------------------------------------------------------


def engines(model: Path) -> int:
    return sum(config.model == str(model) for config in registry.running())


def test_objects_share_an_engine_and_the_last_gives_it_back(own_model: Path) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "num_blocks": 65}
    first = ChatOctavo(str(own_model), max_tokens=3, **settings)
    second = ChatOctavo(str(own_model), temperature=0.3, seed=4, stop=["x"], engine_kwargs=settings)
    third = OctavoLLM(model=str(own_model), max_new_tokens=2, vllm_kwargs=settings)
    other = ChatOctavo(str(own_model), **{**settings, "num_blocks": 66})
    assert engines(own_model) == 0, "making them loads nothing"
    first.invoke("Hello")
    second.invoke("Hello", max_tokens=3)
    third.invoke("Hello")
    assert engines(own_model) == 1
    other.invoke("Hello", max_tokens=3)
    assert engines(own_model) == 2
    copy = first.model_copy(update={"temperature": 0.0})
    tuned = first.configurable_fields(temperature=ConfigurableField(id="t"))
    assert tuned.with_config(configurable={"t": 0.0}).invoke("Hello").content == copy.invoke("Hello").content
    assert engines(own_model) == 2, "other sampling is no other engine"
    other.close()
    first.close()
    first.close()
    with pytest.raises(EngineClosedError, match="make a new one"):
        first.invoke("Hello")
    assert second.invoke("Hello", max_tokens=3)
    second.close()
    assert third.invoke("Hello")
    del third, tuned
    gc.collect()
    assert engines(own_model) == 1
    copy.close()
    assert engines(own_model) == 0


def test_a_call_may_name_another_model(chat: ChatOctavo, own_model: Path) -> None:
    own = ChatOctavo(max_tokens=4)
    message = own.invoke("Hello", model=str(own_model))
    assert message.response_metadata["model_name"] == str(own_model)
    assert own.invoke("Hello").response_metadata["model_name"] == own.model
    assert own._get_ls_params(model=str(own_model))["ls_model_name"] == str(own_model)
    assert engines(own_model) == 1
    own.close()
    assert engines(own_model) == 0


def test_an_event_loop_is_free_while_the_model_loads(tiny_model: Path) -> None:
    async def ask() -> int:
        chat = ChatOctavo(str(tiny_model), dtype="float32", num_blocks=67, max_tokens=3)
        task = asyncio.create_task(chat.ainvoke("Hello"))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        await task
        chat.close()
        return ticks

    assert asyncio.run(ask()) > 5


# -- around it -------------------------------------------------------------------------------------------------------


def test_a_cache_answers_the_second_time() -> None:
    chat = ChatOctavo(max_tokens=8, cache=InMemoryCache())
    first = chat.invoke(QUESTION)
    steps = chat.stats().steps
    assert chat.invoke(QUESTION).content == first.content
    assert asyncio.run(chat.ainvoke(QUESTION)).content == first.content
    assert chat.stats().steps == steps
    chat.invoke(QUESTION, seed=1)
    assert chat.stats().steps > steps, "other parameters are another question"


def test_a_rate_limiter_slows_it_down() -> None:
    limiter = InMemoryRateLimiter(requests_per_second=20, check_every_n_seconds=0.01, max_bucket_size=1)
    chat = ChatOctavo(max_tokens=1, rate_limiter=limiter)
    chat.invoke("Hello")
    began = time.monotonic()
    for _ in range(4):
        chat.invoke("Hello")
    assert time.monotonic() - began >= 0.15


def test_tokens_are_counted_by_the_model(chat: ChatOctavo) -> None:
    with LLM() as llm:
        text = "Übermut tut selten gut. 12345"
        assert chat.get_token_ids(text) == llm.tokenizer.encode(text, add_special_tokens=False)
        assert chat.get_num_tokens(text) == len(chat.get_token_ids(text))
        output = llm.chat(MESSAGES, SamplingParams(max_tokens=1))[0]
    assert chat.get_num_tokens_from_messages([HumanMessage(QUESTION)]) == len(output.prompt_token_ids)

    def tool(city: str) -> str:
        """Weather of a city."""
        return city

    with_tool = chat.get_num_tokens_from_messages([HumanMessage(QUESTION)], tools=[tool])
    assert with_tool > len(output.prompt_token_ids) + 20


def test_the_profile(chat: ChatOctavo) -> None:
    fresh = ChatOctavo(max_tokens=1)
    assert fresh.profile is not None
    assert fresh.profile["tool_calling"]
    assert fresh.profile["structured_output"]
    assert not fresh.profile["image_inputs"]
    fresh.invoke("Hello")
    assert fresh.profile["max_input_tokens"] == 8192, "known when the model is loaded"
    assert ChatOctavo(profile={"name": "mine"}).profile == {"name": "mine"}


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
@pytest.mark.parametrize("given", [{"token": "hf_secret"}, {"hf_token": "hf_secret"}, {"api_key": "hf_secret"}])
@pytest.mark.parametrize("nested", [False, True])
def test_serialised_objects_hold_no_secret(given: dict[str, str], nested: bool) -> None:
    if nested and "api_key" in given:
        given = {"token": "hf_secret"}
    chat = ChatOctavo(temperature=0.5, top_k=3, max_model_len=512, **({"engine_kwargs": given} if nested else given))
    text = dumps(chat)
    assert "hf_secret" not in text + repr(chat) + str(chat.asdict()) + str(chat._get_invocation_params())
    assert 'token"' not in text
    if "api_key" not in given:
        assert chat._shared().config.token == "hf_secret"
    again = loads(text, valid_namespaces=["langchain_octavo"], allowed_objects="all")
    assert isinstance(again, ChatOctavo)
    assert again.asdict() == chat.asdict()
    assert again.engine_kwargs == {"max_model_len": 512}
