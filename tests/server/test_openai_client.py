"""The `openai` client, unmodified, over HTTP on the default model."""

from __future__ import annotations

import openai
import pytest
from conftest import CHAT, Program  # type: ignore[import-not-found]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server: Program) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)


def test_models_are_listed_by_all_their_names(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {CHAT, "default"}
    assert client.models.retrieve(CHAT).id == CHAT
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_a_chat_whole_and_streamed_is_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=CHAT, messages=FRANCE, max_tokens=16, temperature=0)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 16
    stream = client.chat.completions.create(
        model="default", messages=FRANCE, max_completion_tokens=16, temperature=0, stream=True,
        stream_options={"include_usage": True},
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
