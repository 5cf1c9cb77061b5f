"""What is Octavo's own in its LlamaIndex class: parameters, laziness, sharing, batching, closing."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.llms import ChatMessage
from llama_index.llms.octavo import Octavo
from octavo import LLM, ConfigError, EngineClosedError, RequestError, SamplingParams
from octavo.engine import registry

USER = [ChatMessage(role="user", content="Name a colour.")]
ENDLESS = {"max_tokens": 4000, "min_tokens": 4000}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[LLM]:
    """The default model stays loaded while this file runs."""
    with LLM() as llm:
        yield llm


# -------------------------------------------------------------------- parameters


def test_every_sampling_parameter_is_a_field_and_an_argument() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert names <= set(Octavo.model_fields)
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "best_of": 3, "max_tokens": 7,
        "min_tokens": 2, "stop": ["x"], "stop_token_ids": [3], "include_stop_str_in_output": True, "ignore_eos": True,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {5: 1.0},
        "bad_words": ["no"], "allowed_token_ids": [5, 6], "logprobs": 1, "prompt_logprobs": 1, "seed": 4,
        "structured_outputs": {"regex": "a+"}, "skip_special_tokens": False, "detokenize": True,
        "no_repeat_ngram_size": 3, "use_beam_search": False,
    }  # fmt: skip
    search = {"use_beam_search": True, "beam_width": 5, "length_penalty": 0.5, "early_stopping": "never"}
    assert {*values, *search} == names, "a new parameter needs a field of Octavo and a line here"
    found = SamplingParams(max_tokens=None, **search)
    assert Octavo(**search).sampling_params({}) == Octavo().sampling_params(search) == found
    assert Octavo.from_json(Octavo(**search).to_json()).sampling_params({}) == found
    with pytest.raises(RequestError, match="temperature"):
        Octavo(**search, temperature=0.5)
    by_fields, by_kwargs = Octavo(**values), Octavo(additional_kwargs=values)
    assert by_fields.sampling_params({}) == by_kwargs.sampling_params({}) == Octavo().sampling_params(values)
    for name, value in values.items():
        made = getattr(by_fields.sampling_params({}), name)
        assert made == value or name in ("stop", "structured_outputs") or made == tuple(value), name
    again = Octavo.from_json(by_fields.to_json())
    assert again.sampling_params({}) == by_fields.sampling_params({})


def test_beam_search_by_every_call(loaded: LLM) -> None:
    search = {"use_beam_search": True, "beam_width": 3, "max_tokens": 12}
    expected = loaded.chat([{"role": "user", "content": "Name a colour."}], SamplingParams(**search))[0].text
    llm = Octavo(**search)
    assert llm.chat(USER).message.content == expected
    assert Octavo(max_tokens=12).complete("Name a colour.", use_beam_search=True, beam_width=3).text == expected
    *_, last = llm.stream_chat(USER)
    assert last.message.content == expected


def test_a_call_goes_before_additional_kwargs_and_these_before_fields() -> None:
    llm = Octavo(top_k=1, top_p=0.5, additional_kwargs={"top_k": 2, "min_p": 0.5})
    params = llm.sampling_params({"min_p": 0.25})
    assert (params.top_p, params.top_k, params.min_p) == (0.5, 2, 0.25)
    assert llm.sampling_params({"top_k": None}).top_k == SamplingParams().top_k


def test_fields_can_be_changed_later() -> None:
    llm = Octavo(max_tokens=5, ignore_eos=True)
    llm.max_tokens = 3
    assert llm.chat(USER).additional_kwargs["completion_tokens"] == 3
    llm.max_tokens = -1
    with pytest.raises(RequestError) as caught:
        llm.chat(USER)
    assert caught.value.field == "max_tokens"


@pytest.mark.parametrize(
    ("arguments", "kind", "field", "hint"),
    [
        ({"temprature": 1}, RequestError, "temprature", "'temperature'"),
        ({"max_model_len": 512}, RequestError, "max_model_len", "engine_kwargs"),
        ({"temperature": -1}, RequestError, "temperature", "at least 0"),
        ({"temperature": "hot"}, RequestError, "temperature", "number"),
        ({"structured_outputs": {"regexp": "a"}}, RequestError, "regexp", "'regex'"),
        ({"additional_kwargs": {"topp": 1}}, RequestError, "topp", "'top_p'"),
        ({"engine_kwargs": {"max_model_length": 512}}, ConfigError, "max_model_length", "'max_model_len'"),
        ({"engine_kwargs": {"tensor_parallel_size": 2}}, ConfigError, "tensor_parallel_size", "not supported"),
        ({"model": ""}, ConfigError, "model", "folder"),
    ],
)
def test_what_is_wrong_is_named_at_construction(
    arguments: dict, kind: type[RequestError] | type[ConfigError], field: str, hint: str
) -> None:
    with pytest.raises(kind, match=hint) as caught:
        Octavo(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"tools": "a tool"}, "tools"),
        ({"tools": [print]}, "tools"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_what_is_wrong_is_named_at_a_call(arguments: dict, field: str) -> None:
    llm = Octavo(max_tokens=2)
    for call in (llm.chat, llm.stream_chat):
        with pytest.raises(RequestError) as caught:
            call(USER, **arguments)
        assert caught.value.field == field
    with pytest.raises(RequestError, match="chat_template"):
        llm.complete("A prompt", formatted=True, chat_template="{{ messages }}")


def test_n_outputs_are_all_in_raw() -> None:
    pieces = list(Octavo(n=3, seed=1, temperature=1.0, max_tokens=6, ignore_eos=True).stream_chat(USER))
    last = pieces[-1]
    assert [choice["index"] for choice in last.raw["choices"]] == [0, 1, 2]
    assert last.raw["choices"][0]["text"] == last.message.content == "".join(piece.delta for piece in pieces)
    assert last.raw["usage"]["completion_tokens"] == 18
    whole = Octavo(n=2, best_of=3, temperature=1.0, max_tokens=6).chat(USER)
    assert [choice["index"] for choice in whole.raw["choices"]] == [0, 1]
    with pytest.raises(RequestError, match="best_of"):
        Octavo(best_of=2).stream_chat(USER)


def test_logprobs_begin_with_the_token_that_was_chosen() -> None:
    response = Octavo(max_tokens=8, temperature=1.5, seed=3, logprobs=1, prompt_logprobs=0).complete("Once")
    tokenizer = LLM().tokenizer
    for token, found in zip(response.raw["choices"][0]["token_ids"], response.logprobs, strict=True):
        assert bytes(found[0].bytes) == tokenizer.token_bytes(token)
    assert response.raw["prompt_logprobs"][0] is None


def test_cached_tokens_are_told() -> None:
    long = "Tell me about tea. " * 40
    Octavo(max_tokens=1).complete(long)
    response = Octavo(max_tokens=1).complete(long)
    assert response.additional_kwargs["cached_tokens"] > 0
    assert response.raw["usage"]["prompt_tokens_details"] == {
        "cached_tokens": response.additional_kwargs["cached_tokens"]
    }


def test_stop_and_finish_reason() -> None:
    llm = Octavo(temperature=0, max_tokens=30, ignore_eos=True)
    text = llm.complete("One, two, three,", formatted=True).text
    cut = text[len(text) // 2 :][:3]
    stopped = llm.complete("One, two, three,", formatted=True, stop=[cut])
    assert cut not in stopped.text
    assert stopped.additional_kwargs["finish_reason"] == "stop"
    assert stopped.raw["choices"][0]["stop_reason"] == cut
    assert llm.complete("One", formatted=True).additional_kwargs["finish_reason"] == "length"


def test_prompts_of_the_users_own_making() -> None:
    llm = Octavo(
        max_tokens=1, messages_to_prompt=lambda messages: "|".join(message.content for message in messages),
        completion_to_prompt=lambda prompt: f"Q: {prompt} A:",
    )  # fmt: skip
    count = len(LLM().tokenizer.encode("Name a colour.|Name a colour."))
    assert llm.chat([*USER, *USER]).raw["usage"]["prompt_tokens"] == count
    count = len(LLM().tokenizer.encode("Q: Why? A:"))
    assert llm.complete("Why?").raw["usage"]["prompt_tokens"] == count
    assert llm.complete("Why?", formatted=True).raw["usage"]["prompt_tokens"] < count


# -------------------------------------------------------------------- one engine


def test_constructing_and_asking_for_metadata_loads_nothing() -> None:
    script = """
import sys
from llama_index.llms.octavo import Octavo
from octavo.engine import registry
llm = Octavo(engine_kwargs={"max_model_len": 512})
assert "torch" not in sys.modules, "constructing imported torch"
assert llm.to_payload()["model_name"] == llm.model
assert llm.metadata.context_window == 512
assert not registry.running(), "metadata loaded the weights"
window = Octavo().metadata.context_window
with Octavo() as other:
    other.complete("Hi", max_tokens=1)
    assert other.engine.engine.limits.max_model_len == window == other.metadata.context_window
assert not registry.running(), "the engine outlived its users"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr


def test_objects_of_one_model_share_one_engine(loaded: LLM) -> None:
    one, two = Octavo(temperature=0, max_tokens=2), Octavo(temperature=1.0, system_prompt="Hm.", max_tokens=3)
    one.chat(USER)
    two.chat(USER)
    assert one.engine.engine is two.engine.engine is loaded.engine


async def test_concurrent_calls_join_one_batch(loaded: LLM) -> None:
    """20 answers of 24 tokens take about 24 steps, and some more for prompts that are cut: not 20 * 24."""
    llm = Octavo(max_tokens=24, min_tokens=24)
    before = loaded.stats()
    answers = await asyncio.gather(*(llm.achat([ChatMessage(content=f"Name colour {n}.")]) for n in range(20)))
    after = loaded.stats()
    assert all(answer.raw["usage"]["completion_tokens"] == 24 for answer in answers)
    assert after.largest_batch >= 20
    assert after.steps - before.steps < 3 * 24


async def test_objects_and_doors_join_one_batch_too(loaded: LLM) -> None:
    before = loaded.stats()
    calls = [Octavo(temperature=n / 10, max_tokens=24, min_tokens=24).acomplete(f"Colour {n}") for n in range(8)]
    held = asyncio.create_task(asyncio.to_thread(loaded.generate, "Once", SamplingParams(max_tokens=24, min_tokens=24)))
    await asyncio.gather(held, *calls)
    assert loaded.stats().steps - before.steps < 3 * 24


def test_close(loaded: LLM) -> None:
    settings = {"max_model_len": 256, "max_num_seqs": 2}
    with Octavo(max_tokens=2, engine_kwargs=settings) as llm:
        other = Octavo(engine_kwargs=settings)
        engine = llm.engine.engine
        other.chat(USER, max_tokens=2)
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.chat(USER)
    assert not engine.service.closed, "another object uses it"
    assert other.metadata.context_window == 256
    copied = other.model_copy()
    other.close()
    copied.chat(USER, max_tokens=1)
    assert not engine.service.closed
    del copied
    gc.collect()
    assert engine.service.closed
    assert engine.config not in registry.running()


async def test_async_context_manager() -> None:
    async with Octavo(max_tokens=2, engine_kwargs={"max_model_len": 128, "max_num_seqs": 1}) as llm:
        assert (await llm.achat(USER)).message.content is not None
        service = llm.engine.engine.service
    assert service.closed


def test_a_token_is_written_nowhere() -> None:
    llm = Octavo(engine_kwargs={"token": "hf_secret", "max_model_len": 512}, max_tokens=1)
    texts = [llm.to_json(), str(llm.to_dict()), str(llm.to_payload()), llm.model_dump_json()]
    assert not any("hf_secret" in text for text in texts)
    assert Octavo.from_dict(llm.to_dict()).engine_kwargs == {"max_model_len": 512}


def test_a_dropped_stream_needs_no_collector(loaded: LLM) -> None:
    gc.disable()
    try:
        stream = Octavo().stream_chat(USER, **ENDLESS)
        next(stream)
        del stream
        for _ in range(1000):
            if loaded.stats().running == 0:
                break
        assert loaded.stats().running == 0
    finally:
        gc.enable()


def test_a_dropped_stream_gives_its_blocks_back_within_two_steps(loaded: LLM) -> None:
    stream = Octavo().stream_chat(USER, **ENDLESS)
    next(stream)
    stream.close()
    before = loaded.stats()
    after = loaded.stats()
    while after.running:
        after = loaded.stats()
    assert after.steps - before.steps <= 2
    assert after.blocks_used == 0
