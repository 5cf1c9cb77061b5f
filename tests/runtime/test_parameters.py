"""Every parameter does something, and a bad one is refused before any work by an error that names it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.config import EngineConfig, engine_config_from
from octavo.errors import ConfigError, RequestError
from octavo.outputs import RequestOutput

PROMPT = "The quick brown fox jumps"
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), dtype="float32") as llm:
        yield llm


# -- sampling parameters ---------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"temperature": 1.3, "seed": 11, "max_tokens": 30, "ignore_eos": True}
END = {**BASE, "logit_bias": {1: 1e4}}
"""Ends at once, with the end-of-sequence token (1), unless something forbids it."""

Check = Callable[[RequestOutput, RequestOutput], bool]


def _tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def _text_ends(before: RequestOutput, after: RequestOutput) -> bool:
    return after.outputs[0].text == before.outputs[0].text.partition("e")[0] and len(_tokens(after)) < 30


SEARCH = {"seed": 1, "max_tokens": 12, "ignore_eos": True, "use_beam_search": True}


def _score(output: RequestOutput) -> float:
    return output.outputs[0].score or 0.0


EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any], Check]] = {
    "temperature": (BASE, {"temperature": 0.0}, lambda a, b: _tokens(a) != _tokens(b)),
    "top_p": (BASE, {"top_p": 0.2}, lambda a, b: _tokens(a) != _tokens(b)),
    "top_k": (BASE, {"top_k": 2}, lambda a, b: _tokens(a) != _tokens(b)),
    "min_p": (BASE, {"min_p": 0.5}, lambda a, b: _tokens(a) != _tokens(b)),
    "n": (BASE, {"n": 4}, lambda a, b: len(a.outputs) == 1 and len({tuple(o.token_ids) for o in b.outputs}) == 4),
    "best_of": (BASE, {"best_of": 8}, lambda a, b: len(b.outputs) == 1 and b.metrics.output_tokens == 8 * 30),
    "max_tokens": (BASE, {"max_tokens": 7}, lambda a, b: _tokens(b) == _tokens(a)[:7]),
    "min_tokens": (
        {**END, "ignore_eos": False}, {"min_tokens": 5},
        lambda a, b: _tokens(a) == [1] and len(_tokens(b)) == 6 and 1 not in _tokens(b)[:5],
    ),
    "stop": ({**BASE, "temperature": 0.0}, {"stop": "e"}, _text_ends),
    "stop_token_ids": (END, {"stop_token_ids": [1]}, lambda a, b: (len(_tokens(a)), _tokens(b)) == (30, [1])),
    "include_stop_str_in_output": (
        {**BASE, "temperature": 0.0, "stop": "e"}, {"include_stop_str_in_output": True},
        lambda a, b: b.outputs[0].text == a.outputs[0].text + "e",
    ),
    "ignore_eos": ({**END, "ignore_eos": False}, {"ignore_eos": True}, lambda a, b: _tokens(b) == 30 * _tokens(a)),
    "presence_penalty": (BASE, {"presence_penalty": 2.0}, lambda a, b: _tokens(a) != _tokens(b)),
    "frequency_penalty": (BASE, {"frequency_penalty": 2.0}, lambda a, b: _tokens(a) != _tokens(b)),
    "repetition_penalty": (
        {**BASE, "temperature": 0.0, "allowed_token_ids": [5, 6], "logit_bias": {5: 200.0, 6: 150.0}},
        {"repetition_penalty": 2.0}, lambda a, b: _tokens(a) == [5] * 30 and _tokens(b)[:2] == [5, 6],
    ),
    "logit_bias": (BASE, {"logit_bias": {9: 1e4}}, lambda a, b: _tokens(b) == [9] * 30),
    "bad_words": (
        {**BASE, "allowed_token_ids": [69, 70]}, {"bad_words": ["e"]},
        lambda a, b: (set(a.text), set(b.text)) == ({"d", "e"}, {"d"}),
    ),
    "allowed_token_ids": (BASE, {"allowed_token_ids": [7, 9]}, lambda a, b: set(_tokens(b)) == {7, 9}),
    "logprobs": (BASE, {"logprobs": 2}, lambda a, b: a.outputs[0].logprobs is None and
                 [len(entry) >= 2 for entry in b.outputs[0].logprobs or ()] == [True] * 30),
    "prompt_logprobs": (
        BASE, {"prompt_logprobs": 1},
        lambda a, b: a.prompt_logprobs is None and len(b.prompt_logprobs or ()) == len(b.prompt_token_ids),
    ),
    "seed": (BASE, {"seed": 12}, lambda a, b: _tokens(a) != _tokens(b)),
    "structured_outputs": (
        BASE, {"structured_outputs": StructuredOutputsParams(regex="[0-9]{3} the")},
        lambda a, b: re.fullmatch("[0-9]{3} the", b.text) is not None and b.outputs[0].finish_reason == "stop",
    ),
    "no_repeat_ngram_size": (
        {**BASE, "logit_bias": {9: 50.0}}, {"no_repeat_ngram_size": 2},
        lambda a, b: _tokens(a) == [9] * 30 and len({*zip(_tokens(b), _tokens(b)[1:], strict=False)}) == 29,
    ),
    "use_beam_search": (
        {**SEARCH, "use_beam_search": False}, {"use_beam_search": True},
        lambda a, b: a.outputs[0].score is None and _score(b) < 0,
    ),
    "beam_width": ({**SEARCH, "beam_width": 1}, {"beam_width": 8}, lambda a, b: _score(a) < _score(b)),
    "length_penalty": (SEARCH, {"length_penalty": 0.0}, lambda a, b: round(_score(a) * 12 - _score(b), 4) == 0),
    "early_stopping": (
        # an output may end at any time, and is the better the longer it is
        {**SEARCH, "ignore_eos": False, "beam_width": 2, "length_penalty": 5.0, "logit_bias": {1: 8.0}},
        {"early_stopping": True}, lambda a, b: len(_tokens(a)) > len(_tokens(b)),
    ),
    "skip_special_tokens": (
        END, {"skip_special_tokens": False}, lambda a, b: (a.text, b.text) == ("", "</s>" * 30)
    ),
    "detokenize": (BASE, {"detokenize": False}, lambda a, b: b.text == "" and _tokens(a) == _tokens(b)),
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in fields(SamplingParams)])
def test_every_field_has_its_effect(llm: LLM, field: str) -> None:
    """A field without an entry in `EFFECTS` fails here: say there what it does."""
    before, change, effect = EFFECTS[field]
    assert field in change
    plain = llm.generate(PROMPT, SamplingParams(**before))[0]
    assert _tokens(plain) == _tokens(llm.generate(PROMPT, SamplingParams(**before))[0])
    assert effect(plain, llm.generate(PROMPT, SamplingParams(**(before | change)))[0])


BAD: list[tuple[str, list[Any]]] = [
    ("structured_outputs", [{"json": {}}, "json", 1]),
    ("temperature", [-0.1, NAN, INFINITY, 1e39, "hot", None, True]),
    ("top_p", [0, -1, 1.01, NAN, "x", None]),
    ("top_k", [-2, 1.5, 2**31, True, None]),
    ("min_p", [-0.1, 1.1, NAN]),
    ("n", [0, -1, 129, 1.0, True, None]),
    ("best_of", [0, 129, 1.5, True]),
    ("max_tokens", [0, -1, 2.5, True, "x"]),
    ("min_tokens", [-1, 17, 1.5, None]),
    ("stop", ["", [""], 5, [5], b"x", {"a": 1}]),
    ("stop_token_ids", [5, "ab", [-1], [1.5], [True]]),
    ("include_stop_str_in_output", [1, None, "yes"]),
    ("ignore_eos", [1, None]),
    ("presence_penalty", [-2.1, 2.1, NAN]),
    ("frequency_penalty", [-2.1, 2.1, NAN]),
    ("repetition_penalty", [0, -1, 1e-39, 1e39, NAN]),
    ("logit_bias", [[1], {"1": 1}, {-1: 1}, {1: "x"}, {1: NAN}, {1: 1e5}]),
    ("bad_words", [5, [""], [5]]),
    ("allowed_token_ids", [[], 5, [-1], ["x"]]),
    ("logprobs", [-1, 101, 1.5, True]),
    ("prompt_logprobs", [-1, 101, True]),
    ("seed", [1.5, 2**63, -(2**63) - 1, "x", True]),
    ("no_repeat_ngram_size", [-1, 1.5, None, True]),
    ("use_beam_search", [1, None]),
    ("beam_width", [0, 129, 2.0, True]),
    ("length_penalty", [NAN, 5.5, "x", None]),
    ("early_stopping", [None, "always", 2]),
    ("skip_special_tokens", [1, None]),
    ("detokenize", [0, None]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD for value in values], ids=repr)
def test_a_bad_sampling_parameter_is_named(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)


def test_every_sampling_parameter_has_bad_values() -> None:
    assert {field for field, _ in BAD} == {field.name for field in fields(SamplingParams)}


def test_contradictions_are_named() -> None:
    for settings, field in (
        ({"n": 3, "best_of": 2}, "best_of"), ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": "x", "detokenize": False}, "stop"), ({"beam_width": 4}, "beam_width"),
        ({"length_penalty": 0.5}, "length_penalty"), ({"early_stopping": True}, "early_stopping"),
        *(({"use_beam_search": True, **more}, field) for more, field in (
            ({"n": 3, "beam_width": 2}, "beam_width"), ({"best_of": 3, "beam_width": 2}, "best_of"),
            ({"temperature": 0.7}, "temperature"), ({"top_p": 0.9}, "top_p"), ({"top_k": 5}, "top_k"),
            ({"min_p": 0.1}, "min_p"), ({"stop": "x"}, "stop"), ({"logprobs": 1}, "logprobs"),
            ({"prompt_logprobs": 1}, "prompt_logprobs"),
            ({"structured_outputs": StructuredOutputsParams(regex="a")}, "structured_outputs"),
        )),
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            SamplingParams(**settings)
        assert caught.value.field == field
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("cold", [1e-6, 1e-30, 1e-45])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}], ids=str)
def test_a_temperature_next_to_nothing_is_greedy(llm: LLM, cold: float, filters: dict[str, Any]) -> None:
    """Logits over 1e-45 are not finite in float32: tokens 0 and 1 came out of that."""
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    chilled = SamplingParams(temperature=cold, max_tokens=8, ignore_eos=True, **filters)
    warm = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=1)
    expected, ours, _ = llm.generate([PROMPT] * 3, [greedy, chilled, warm])
    assert _tokens(ours) == _tokens(expected)


# -- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"), ([[]], "prompt"), (5, "prompts"), (None, "prompts"), (b"x", "prompts"), (["x", 5], "prompt"),
        ([-1], "prompt_token_ids"), ([300], "prompt_token_ids"), ([True], "prompt_token_ids"), ([1, 2.5], "prompt"),
        ([[1, "x"]], "prompt_token_ids"), ({}, "prompt"), ({"prompt": None}, "prompt"), ("\ud800", "prompt"),
        ({"prompt_token_ids": "text"}, "prompt_token_ids"), ({"prompt": "x", "cache_salt": 5}, "cache_salt"),
        ([7] * 512, "prompt"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_a_bad_prompt_is_refused_before_any_work(llm: LLM, prompt: Any, field: str) -> None:
    steps = llm.stats().steps
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt)
    assert caught.value.field == field
    assert llm.stats().steps == steps


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sampling_params": {"max_tokens": 3}}, "sampling_params"), ({"sampling_params": "x"}, "sampling_params"),
        ({"sampling_params": [SamplingParams()]}, "sampling_params"), ({"sampling_params": [None, 5]},
        "sampling_params"),
        ({"priority": 1.5}, "priority"), ({"priority": True}, "priority"), ({"stream": True}, "stream"),
        *(({"sampling_params": SamplingParams(**{name: value})}, name) for name, value in (
            ("allowed_token_ids", [5, 300]), ("stop_token_ids", [300]), ("logit_bias", {300: 1.0}),
        )),
        ({"sampling_params": SamplingParams(min_tokens=512, max_tokens=None)}, "min_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_bad_request_is_refused_before_any_work(llm: LLM, options: dict[str, Any], field: str) -> None:
    """Also where only the last prompt of a list is bad: none of the others starts."""
    steps = llm.stats().steps
    with pytest.raises(RequestError) as caught:
        llm.generate(["one", "two"], **options)
    assert caught.value.field == field
    with pytest.raises(RequestError, match="prompt 2"):
        llm.generate(["one", "two", ""])
    assert llm.stats().steps == steps


def test_what_a_stream_cannot_do_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="best_of") as caught:
        llm.generate(PROMPT, SamplingParams(best_of=2), stream=True)
    assert caught.value.field == "best_of"
    with pytest.raises(RequestError) as caught:
        llm.chat([[{"role": "user", "content": "a"}]] * 2, stream=True)
    assert caught.value.field == "stream"


@pytest.mark.parametrize(
    "messages",
    ["hello", [], {}, None, [5], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 5}],
     [[{"role": "user", "content": "x"}], []], [[{"role": "user", "content": "x"}], 5],
     [{"role": "user", "content": "x"}, 5]], ids=str,
)  # fmt: skip
def test_bad_messages_are_refused(llm: LLM, messages: Any) -> None:
    steps = llm.stats().steps
    with pytest.raises(RequestError) as caught:
        llm.chat(messages)
    assert caught.value.field == "messages"
    assert llm.stats().steps == steps


# -- engine arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_parallel_size", 2), ("pipeline_parallel_size", 2), ("data_parallel_size", 2), ("quantization", "awq"),
        ("quantization", "fp8"), ("kv_cache_dtype", "fp8_e5m2"), ("speculative_config", {"model": "x"}),
        ("enable_lora", True), ("enable_chunked_prefill", False), ("tokenizer", "other"), ("tokenizer_mode", "slow"),
        ("cpu_offload_gb", 4), ("swap_space", 4), ("max_modellen", 5), ("no_such_thing", 1),
        ("gpu_memory_utilization", 0), ("gpu_memory_utilization", 1.1), ("gpu_memory_utilization", True),
        ("max_model_len", 0), ("max_model_len", 513), ("max_model_len", "8k"), ("dtype", "int4"), ("device", "tpu"),
        ("device", "cuda:x"), ("device", "cpu:x"), ("load_format", "pickle"), ("block_size", 24), ("num_blocks", 1),
        ("max_num_seqs", 0), ("max_num_batched_tokens", 4), ("max_queued_requests", 0), ("trust_remote_code", "yes"),
        ("enable_prefix_caching", 1), ("seed", 1.5), ("revision", 5), ("token", 5), ("kv_cache_memory", 10),
        ("kv_cache_memory", -1),
    ],
)  # fmt: skip
def test_what_the_engine_cannot_do_is_refused_by_name(tiny_model: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name if name not in ("kv_cache_memory",) or value == -1 else "KV") as caught:
        LLM(str(tiny_model), **{name: value})
    assert caught.value.field == name


def test_messages_help() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        engine_config_from("m", {"max_modellen": 5})
    with pytest.raises(ConfigError, match="two names"):
        engine_config_from("m", {"hf_token": "a", "token": "b"})
    with pytest.raises(ConfigError) as caught:
        engine_config_from("m", {"num_blocks": 5, "gpu_memory_utilization": 0.5})
    assert caught.value.field == "num_blocks"
    with pytest.raises(ConfigError) as caught:
        engine_config_from("", {})
    assert caught.value.field == "model"


def test_values_that_ask_for_nothing_special_are_accepted() -> None:
    config = engine_config_from("m", {
        "tensor_parallel_size": 1, "quantization": None, "trust_remote_code": False, "enforce_eager": True,
        "enable_chunked_prefill": True, "kv_cache_dtype": "auto", "swap_space": 0, "hf_token": "secret",
    })  # fmt: skip
    assert config == EngineConfig(model="m", token="secret")


def test_sizes_are_honoured(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32", max_model_len=100, block_size=16, num_blocks=20) as llm:
        limits = llm.engine.limits
        assert (limits.max_model_len, limits.block_size, limits.num_blocks, limits.dtype) == (100, 16, 20, "float32")
        assert llm.stats().blocks_total == 19
    block = 2 * 2 * 2 * 32 * 32 * 4  # keys and values, layers, heads, slots, head size, bytes
    with LLM(str(tiny_model), dtype="float32", block_size=32, kv_cache_memory=10 * block + 5) as llm:
        assert llm.engine.limits.num_blocks == 10
        assert llm.engine.limits.max_model_len == 9 * 32
    with (
        LLM(str(tiny_model), dtype="float32", gpu_memory_utilization=0.9) as large,
        LLM(str(tiny_model), dtype="float32", gpu_memory_utilization=0.6) as small,
    ):
        assert large.engine.limits.num_blocks > small.engine.limits.num_blocks > 10
    with LLM(str(tiny_model), dtype="bfloat16", max_num_seqs=2, num_blocks=9) as llm:
        assert llm.engine.limits.dtype == "bfloat16"
        outputs = llm.generate([[5]] * 4, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
        assert llm.stats().steps >= 20, "more than two ran at once"
        assert len({tuple(_tokens(output)) for output in outputs}) == 1


def test_without_prefix_caching_nothing_is_kept(tiny_model: Path) -> None:
    prompt = [9] * 100
    for caching, expected in ((True, 96), (False, 0)):
        with LLM(str(tiny_model), dtype="float32", enable_prefix_caching=caching) as llm:
            llm.generate(prompt)
            assert llm.generate(prompt)[0].num_cached_tokens == expected
            assert (llm.stats().blocks_cached > 0) == caching
