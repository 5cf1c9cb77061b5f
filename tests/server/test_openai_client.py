"""The `openai` client, unmodified, over HTTP on the default model."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from serving_helpers import CHAT, EMBEDDER, Program

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server: Program) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)


def test_models_are_listed_by_all_their_names(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {CHAT, "default"}
    assert client.models.retrieve(CHAT).id == CHAT
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


WHOLE = {"ignore_eos": True}
"""In float32 the answer is shorter than in bfloat16."""


def test_a_chat_whole_and_streamed_is_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=CHAT, messages=FRANCE, max_tokens=16, temperature=0, extra_body=WHOLE)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 16
    stream = client.chat.completions.create(
        model="default", messages=FRANCE, max_completion_tokens=16, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body=WHOLE,
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 16
    assert not chunks[-1].choices
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "1 2 3 4"]
    found = client.completions.create(model=CHAT, prompt=prompts, max_tokens=4, temperature=0, n=2, echo=True)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text
    assert found.choices[0].text.startswith("The capital of France is Paris")
    assert found.choices[2].text.startswith("1 2 3 4")
    streamed = client.completions.create(model=CHAT, prompt=prompts, max_tokens=4, temperature=0, stream=True)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [found.choices[0].text[len(prompts[0]) :], found.choices[2].text[len(prompts[1]) :]]


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=FRANCE)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=CHAT, messages=FRANCE, temperature=-1)
    assert refused.value.param == "temperature"


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": CHAT, "messages": ASK, "tools": [WEATHER], "tool_choice": choice, "temperature": 0, "max_tokens": 80,
        "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    [call] = whole.message.tool_calls or []
    assert call.function.name == "get_weather"
    assert "city" in json.loads(call.function.arguments)
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    [streamed] = final.message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert streamed.id
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."}
    back = [*ASK, whole.message.model_dump(), result]
    answer = client.chat.completions.create(model=CHAT, messages=back, tools=[WEATHER], max_tokens=8, temperature=0)
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_may_stay_unused(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=CHAT, messages=FRANCE, tools=[WEATHER], tool_choice=choice, temperature=0, max_tokens=8
    ).choices[0]
    assert answer.message.content or answer.message.tool_calls
    assert choice == "auto" or not answer.message.tool_calls


class City(BaseModel):
    name: str
    inhabitants: int


def test_structured_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=CHAT, messages=[{"role": "user", "content": "Describe Paris."}], response_format=City, max_tokens=80
    ).choices[0]
    assert isinstance(answer.message.parsed, City)
    plain = client.chat.completions.create(
        model=CHAT, messages=FRANCE, response_format={"type": "json_object"}, max_tokens=60
    )
    assert isinstance(json.loads(plain.choices[0].message.content or ""), dict)


def test_vllms_forms(client: openai.OpenAI) -> None:
    def answer(**extra: Any) -> str:
        found = client.completions.create(model=CHAT, prompt="The answer is", max_tokens=20, extra_body=extra)
        return found.choices[0].text

    for form in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
        assert answer(**form) in ("yes", "no")
    assert re.fullmatch(r"\d{3}-\d{3}", answer(guided_regex=r"\d{3}-\d{3}"))
    assert answer(guided_grammar='start: "a" "b"+ "c"').startswith("ab")
    properties = {"a": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    assert json.loads(answer(guided_json=schema))["a"] in (True, False)


def test_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHAT, "messages": FRANCE, "max_tokens": 4, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    entries = whole.logprobs.content or []
    assert "".join(entry.token for entry in entries) == whole.message.content
    assert [len(entry.top_logprobs) for entry in entries] == [3] * 4
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in entries)
    chunks = list(client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True))
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [entry.token for one in streamed for entry in one.content or []] == [entry.token for entry in entries]


def test_scores_of_a_prompt(client: openai.OpenAI) -> None:
    """`echo` with `logprobs` and no new token, as harnesses score texts."""
    text = "The capital of France is Paris"
    choice = client.completions.create(model=CHAT, prompt=text, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert choice.text == text
    found = choice.logprobs
    assert "".join(found.tokens) == text
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[-1] > -1
    assert len(found.tokens) == len(found.text_offset) == 6
    assert all(text[start:].startswith(token) for start, token in zip(found.text_offset, found.tokens, strict=True))


def test_sampling_is_reproducible_and_bounded(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        own = ("n", "seed", "best_of", "logit_bias")
        extra = {name: more.pop(name) for name in list(more) if name not in own}
        found = client.completions.create(
            model=CHAT, prompt="Once upon a time", max_tokens=8, temperature=1, extra_body=extra, **more
        )
        return [choice.text for choice in found.choices]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert len(set(texts(n=4, seed=3))) > 1
    assert len(texts(n=2, best_of=4)) == 2
    assert texts(top_k=1) == texts(top_k=1)
    assert len(texts(use_beam_search=True, n=2, beam_width=4)) == 2
    assert texts(seed=4, logit_bias={"9": 100})[0] == texts(allowed_token_ids=[9])[0]


def test_embeddings(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model=EMBEDDER, input=["a cat", "a dog"])
    plain = client.embeddings.create(model=EMBEDDER, input="a cat", encoding_format="float")
    assert len(found.data) == 2
    assert found.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert found.usage.prompt_tokens > 4
    with pytest.raises(openai.BadRequestError, match="384"):
        client.embeddings.create(model=EMBEDDER, input="a", dimensions=100)
    with pytest.raises(openai.BadRequestError, match="makes text"):
        client.embeddings.create(model=CHAT, input="a")
