"""`OctavoLLM`: the contract, the fields of langchain-community's `VLLM`, and outputs with all that they have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from base_llm_contract import BaseLLMContract
from langchain_octavo import OctavoLLM
from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, RequestError

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module", autouse=True)
def keeper() -> Iterator[OctavoLLM]:
    """Keeps the engine between tests."""
    llm = OctavoLLM(**GREEDY)
    yield llm
    llm.close()


class TestContract(BaseLLMContract):
    llm_class = OctavoLLM
    prompts: ClassVar = ["The capital of France is", "Water boils at", "Once upon a time"]
    settings: ClassVar = GREEDY
    bad_prompt = "word " * 9000


# -- a user of VLLM changes the import -------------------------------------------------------------------------------


def test_the_fields_of_vllm_and_their_defaults() -> None:
    llm = OctavoLLM(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", tensor_parallel_size=1, trust_remote_code=False, n=1, best_of=None,
        presence_penalty=0.0, frequency_penalty=0.0, temperature=1.0, top_p=1.0, top_k=-1, use_beam_search=False,
        stop=None, ignore_eos=False, max_new_tokens=512, logprobs=None, dtype="auto", download_dir=None,
        vllm_kwargs={"max_model_len": 512},
    )  # fmt: skip
    plain = OctavoLLM()
    assert llm._sampling(None, {}, None) == plain._sampling(None, {}, None)
    assert llm._sampling(None, {}, None) == SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=512)
    assert llm.max_new_tokens == llm.max_tokens == 512
    assert llm.vllm_kwargs == llm.engine_kwargs == {"max_model_len": 512}
    assert llm._shared().config.max_model_len == 512
    assert not llm._shared().started


@pytest.mark.parametrize(
    ("name", "value"),
    [("tensor_parallel_size", 2), ("download_dir", "/models"), ("speculative_config", {})],
)
def test_what_the_engine_cannot_honour_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as raised:
        OctavoLLM(**{name: value})
    assert raised.value.field == name


def test_names_given_twice_and_values_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="max_tokens is given twice"):
        OctavoLLM(max_new_tokens=3, max_tokens=3)
    with pytest.raises(RequestError) as raised:
        OctavoLLM(top_p=3)
    assert raised.value.field == "top_p"
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        OctavoLLM(max_new_token=3)
    with pytest.raises(RequestError) as raised:
        OctavoLLM(**GREEDY).invoke("x", max_new_tokens=0)
    assert raised.value.field == "max_tokens"


# -- what a generation has -------------------------------------------------------------------------------------------


def test_log_probabilities_and_figures() -> None:
    result = OctavoLLM(**GREEDY, logprobs=2).generate(["The capital of France is", "Water boils at"], n=2)
    for choices in result.generations:
        for choice in choices:
            info = choice.generation_info
            assert info is not None
            tokens = info["logprobs"]["content"]
            assert "".join(token["token"] for token in tokens).strip() == choice.text.strip()
            assert all(len(token["top_logprobs"]) >= 2 for token in tokens)
            assert info["cumulative_logprob"] == pytest.approx(sum(token["logprob"] for token in tokens), abs=1e-3)
            assert info["finish_reason"] == "length"
            assert info["model_name"] == OctavoLLM().model
            assert info["time_to_first_token"] > 0
            assert info["usage_metadata"]["output_tokens"] == 24


def test_it_says_what_llm_says(keeper: OctavoLLM) -> None:
    with LLM() as llm:
        output = llm.generate("Once upon a time", SamplingParams(temperature=0.9, seed=5, max_tokens=12))[0]
    assert keeper.invoke("Once upon a time", temperature=0.9, seed=5) == output.outputs[0].text


def test_the_best_of_several(keeper: OctavoLLM) -> None:
    result = keeper.generate(["Once upon a time"], n=2, best_of=4, temperature=1.0, seed=1)
    ranked = [choice.generation_info["cumulative_logprob"] for choice in result.generations[0]]  # type: ignore[index]
    assert ranked == sorted(ranked, reverse=True)
    with pytest.raises(RequestError, match="best_of"):
        list(keeper.stream("Once", best_of=2))


def test_beam_search_as_with_vllm(keeper: OctavoLLM) -> None:
    """`best_of` is the number of beams, as it was there. All of a batch, and a stream, search in the engine."""
    prompts = ["The capital of France is", "Water boils at"]
    with LLM() as llm:
        params = SamplingParams(use_beam_search=True, beam_width=3, n=2, max_tokens=12)
        expected = [[choice.text for choice in output.outputs] for output in llm.generate(prompts, params)]
    llm = OctavoLLM(use_beam_search=True, best_of=3, n=2, max_new_tokens=12)
    result = llm.generate(prompts)
    assert [[choice.text for choice in choices] for choices in result.generations] == expected
    for choices in result.generations:
        scores = [choice.generation_info["score"] for choice in choices]  # type: ignore[index]
        assert scores == sorted(scores, reverse=True)
    search: dict[str, Any] = {"use_beam_search": True, "beam_width": 3}
    assert keeper.invoke(prompts[0], **search) == expected[0][0]
    assert "".join(keeper.stream(prompts[0], **search)) == expected[0][0]


def test_a_stream_has_the_figures_at_its_end(keeper: OctavoLLM) -> None:
    chunks = list(keeper._stream("Once upon a time"))
    assert all(chunk.generation_info is None for chunk in chunks[:-1])
    info = chunks[-1].generation_info
    assert info is not None
    assert info["usage_metadata"]["output_tokens"] == 12
    assert info["tokens_per_second"] > 0
