"""`LLM` from outside: prompts in every form, streams, conversations, outputs and their figures, one engine for many."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, EngineClosedError, RequestError, RequestFailedError
from octavo.outputs import RequestOutput, StreamPiece

PROMPT = "The quick brown fox"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

WEEK = "The days of the week are Monday, Tuesday,"


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def real(default_model: Path) -> Iterator[LLM]:
    with LLM(str(default_model), dtype="float32", max_num_seqs=8) as llm:
        yield llm


def ids_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_every_form_of_a_prompt_gives_the_same_tokens(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    (expected,) = llm.generate(PROMPT, GREEDY)
    assert (expected.prompt, expected.prompt_token_ids) == (PROMPT, ids)
    assert len(ids_of(expected)) == 12
    forms: list[Any] = [
        [PROMPT], (PROMPT,), ids, tuple(ids), [ids], [tuple(ids)], {"prompt": PROMPT}, [{"prompt": PROMPT}],
        {"prompt_token_ids": ids}, {"prompt": "something else", "prompt_token_ids": ids},
    ]  # fmt: skip
    for form in forms:
        (output,) = llm.generate(form, GREEDY)
        assert ids_of(output) == ids_of(expected), form
        assert output.outputs[0].text == expected.outputs[0].text
    assert llm.generate(ids, GREEDY)[0].prompt is None, "a prompt of token ids has no text"
    mixed = llm.generate([PROMPT, ids, {"prompt": PROMPT}, "Numbers"], GREEDY)
    assert [ids_of(output) == ids_of(expected) for output in mixed] == [True, True, True, False]
    assert llm.generate([], GREEDY) == []


def test_outputs_are_in_the_order_of_the_prompts_whoever_ends_first(llm: LLM) -> None:
    lengths = [30, 1, 17, 2, 25, 9]
    prompts = [[5 + i, 9, 7] for i in range(6)]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(ids_of(output)) for output in outputs] == lengths
    assert len({output.request_id for output in outputs}) == 6
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        assert ids_of(llm.generate(prompt, param)[0]) == ids_of(output)


def test_defaults_are_those_of_sampling_params(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT)
    assert 1 <= len(ids_of(output)) <= 16
    assert output.outputs[0].cumulative_logprob is None
    (first, second) = llm.generate([PROMPT, PROMPT], [None, SamplingParams(max_tokens=3, ignore_eos=True)])
    assert (len(first.outputs), len(ids_of(second))) == (1, 3)


def test_without_max_tokens_the_length_of_the_model_ends_it(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32", max_model_len=48) as llm:
        assert llm.engine.limits.max_model_len == 48
        for asked in (None, 1000):
            params = SamplingParams(temperature=0.0, max_tokens=asked, ignore_eos=True)
            (output,) = llm.generate([7] * 20, params)
            assert (len(ids_of(output)), output.outputs[0].finish_reason) == (28, "length")
        with pytest.raises(RequestError, match="48") as caught:
            llm.generate([7] * 48, GREEDY)
        assert caught.value.field == "prompt"
        assert len(ids_of(llm.generate([7] * 47, GREEDY)[0])) == 1


def test_a_salt_hides_the_cache_and_changes_no_token(llm: LLM) -> None:
    prompt = [(7 * i) % 290 + 2 for i in range(70)]
    (plain,) = llm.generate(prompt, GREEDY)
    (salted,) = llm.generate({"prompt_token_ids": prompt, "cache_salt": "tenant"}, GREEDY)
    (again,) = llm.generate(prompt, GREEDY)
    assert [output.num_cached_tokens for output in (plain, salted, again)] == [0, 0, 64]
    assert ids_of(plain) == ids_of(salted) == ids_of(again)


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=5, max_tokens=40, n=3, temperature=1.4, logprobs=1)],
                         ids=["greedy", "n=3"])  # fmt: skip
def test_a_stream_joins_to_the_whole_output(llm: LLM, params: SamplingParams) -> None:
    (whole,) = llm.generate(PROMPT, params)
    pieces = list(llm.generate(PROMPT, params, stream=True))
    assert len(pieces) > 10, "everything came at once"
    assert all(isinstance(piece, StreamPiece) for piece in pieces)
    for index, output in enumerate(whole.outputs):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == output.text
        assert [token for piece in mine for token in piece.token_ids] == output.token_ids
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [output.finish_reason]
        if params.logprobs is not None:
            assert [entry for piece in mine for entry in piece.logprobs or ()] == output.logprobs
    assert [piece.output is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].output is not None
    assert pieces[-1].output.outputs == whole.outputs


def test_pieces_come_while_the_request_runs(llm: LLM) -> None:
    stream = llm.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
    next(stream)
    assert llm.stats().running == 1, "the first piece came with the last"
    assert not stream.output.finished
    assert 1 <= len(ids_of(stream.output)) < 400
    stream.close()
    assert llm.stats().running == 0


@pytest.mark.parametrize("leave", ["close", "with", "drop", "throw"])
def test_leaving_a_stream_ends_its_request(llm: LLM, leave: str) -> None:
    """`stats` runs on the engine's thread after the abort, so nothing has to be waited for."""
    params = SamplingParams(temperature=0.0, max_tokens=480, ignore_eos=True, n=2)
    stream = llm.stream(PROMPT, params)
    next(stream)
    assert llm.stats().blocks_used > 0
    if leave == "close":
        stream.close()
        stream.close()
    elif leave == "drop":
        del stream
    elif leave == "with":
        with stream:
            next(stream)
    else:
        with pytest.raises(KeyboardInterrupt), stream:
            raise KeyboardInterrupt
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def test_a_stream_that_was_closed_ends_with_what_it_had(llm: LLM) -> None:
    stream = llm.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=480, ignore_eos=True))
    next(stream)
    stream.close()
    rest = list(stream)
    assert rest[-1].finish_reason == "abort"
    assert not stream.output.finished
    assert stream.output.outputs[0].finish_reason == "abort"
    assert list(stream) == []


# -- conversations ---------------------------------------------------------------------------------------------------


def test_chat_is_generate_on_the_rendered_template(llm: LLM) -> None:
    (answer,) = llm.chat(QUESTION, GREEDY)
    text = "user: What is the capital of France?\nassistant:"
    assert answer.prompt == text
    assert answer.prompt_token_ids == llm.tokenizer.encode(text, add_special_tokens=False)
    assert ids_of(answer) == ids_of(llm.generate(answer.prompt_token_ids, GREEDY)[0])
    other = [{"role": "system", "content": "Be brief."}, *QUESTION]
    first, second = llm.chat([QUESTION, other], GREEDY)
    assert ids_of(first) == ids_of(answer)
    assert second.prompt == f"system: Be brief.\n{text}"
    (bare,) = llm.chat(QUESTION, GREEDY, add_generation_prompt=False)
    assert bare.prompt == text.removesuffix("assistant:")
    template = "{{ messages[0]['content'] }} ({{ tone }})"
    (own,) = llm.chat(QUESTION, GREEDY, chat_template=template, chat_template_kwargs={"tone": "kind"})
    assert own.prompt == "What is the capital of France? (kind)"
    streamed = "".join(piece.text for piece in llm.chat(QUESTION, GREEDY, stream=True))
    assert streamed == answer.outputs[0].text


def test_the_default_model_answers(real: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24)
    (answer,) = real.chat(QUESTION, params)
    assert "Paris" in answer.outputs[0].text
    assert answer.outputs[0].finish_reason == "stop", "the end of the turn is not seen"
    assert answer.outputs[0].text == answer.outputs[0].text.strip()
    assert "<|im_end|>" not in answer.outputs[0].text
    assert "".join(piece.text for piece in real.chat(QUESTION, params, stream=True)) == answer.outputs[0].text
    counting, water = real.generate([WEEK, "Water boils at 100 degrees"], SamplingParams(temperature=0.0, max_tokens=6))
    assert counting.outputs[0].text.startswith(" Wednesday, Thursday,")
    assert "Celsius" in water.outputs[0].text


def test_stop_strings_and_logit_bias_on_the_default_model(real: LLM) -> None:
    (stopped,) = real.generate(WEEK, SamplingParams(temperature=0.0, max_tokens=20, stop=["day, Fri", "Sunday"]))
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == (" Wednesday, Thurs", "day, Fri")
    (token,) = real.tokenizer.encode(" Wednesday", add_special_tokens=False)
    (other,) = real.generate(WEEK, SamplingParams(temperature=0.0, max_tokens=2, logit_bias={token: -100.0}))
    assert not other.outputs[0].text.startswith(" Wednesday")
    (worded,) = real.generate(WEEK, SamplingParams(temperature=0.0, max_tokens=20, bad_words=["Thursday"]))
    assert worded.outputs[0].text.startswith(" Wednesday,")
    assert "Thursday" not in worded.outputs[0].text


# -- outputs ---------------------------------------------------------------------------------------------------------


def test_metrics_add_up(llm: LLM) -> None:
    prompt = [(11 * i) % 290 + 2 for i in range(100)]
    began = time.monotonic()
    (output,) = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=20, n=2, ignore_eos=True))
    took = time.monotonic() - began
    metrics = output.metrics
    assert began <= metrics.arrival <= began + took
    assert metrics.queue_time is not None
    assert metrics.prefill_time is not None
    assert metrics.first_token_time is not None
    assert metrics.last_token_time is not None
    assert 0 <= metrics.queue_time < metrics.first_token_time < metrics.last_token_time <= took
    assert metrics.queue_time + metrics.prefill_time == pytest.approx(metrics.first_token_time)
    assert (metrics.prompt_tokens, metrics.output_tokens, metrics.preemptions) == (100, 40, 0)
    assert metrics.time_per_token == pytest.approx((metrics.last_token_time - metrics.first_token_time) / 39)
    assert metrics.cached_tokens == output.num_cached_tokens == 0
    (again,) = llm.generate(prompt, GREEDY)
    assert again.metrics.cached_tokens == 96
    (one,) = llm.generate(prompt, SamplingParams(max_tokens=1))
    assert one.metrics.time_per_token is None


def test_queue_time_is_the_wait_for_a_row(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32", max_num_seqs=1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        first, second = llm.generate([[5, 6], [7, 8]], params)
        began, end = second.metrics, first.metrics
        assert end.last_token_time is not None
        assert began.queue_time is not None
        assert end.queue_time is not None
        assert began.arrival + began.queue_time >= end.arrival + end.last_token_time > end.arrival + end.queue_time


def test_no_bar_where_stderr_is_no_terminal(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([PROMPT] * 3, GREEDY)
    assert capfd.readouterr() == ("", "")
    llm.generate([PROMPT] * 3, GREEDY, use_tqdm=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err


def test_a_bar_on_a_terminal(llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate([PROMPT] * 3, GREEDY)
    assert "3/3" in capsys.readouterr().err
    for quiet in ([PROMPT], [PROMPT] * 2):
        llm.generate(quiet, GREEDY, use_tqdm=None if len(quiet) == 1 else False)
        assert capsys.readouterr().err == ""


def test_one_failure_in_a_batch_loses_nothing_else(llm: LLM) -> None:
    impossible = SamplingParams(allowed_token_ids=[1], min_tokens=2, max_tokens=4)
    params = [GREEDY, impossible, GREEDY]
    prompts = [[5, 6], [7, 8], [9, 10]]
    listed = llm.generate(prompts, params, return_exceptions=True)
    assert isinstance(listed[1], RequestFailedError)
    with pytest.raises(RequestFailedError) as caught:
        llm.generate(prompts, params)
    outputs = caught.value.outputs  # type: ignore[attr-defined]
    for number in (0, 2):
        assert ids_of(outputs[number]) == ids_of(listed[number]) == ids_of(llm.generate(prompts[number], GREEDY)[0])
    assert llm.stats().blocks_used == 0


# -- engines ---------------------------------------------------------------------------------------------------------


def test_the_same_settings_share_one_engine(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32", num_blocks=9) as first:
        with LLM(str(tiny_model), dtype="float32", num_blocks=9) as second:
            assert second.engine is first.engine
            with LLM(str(tiny_model), dtype="float32", num_blocks=10) as other:
                assert other.engine is not first.engine
                assert other.stats().blocks_total == 9
        expected = first.generate(PROMPT, GREEDY)  # the other's close() is not this one's
        service = first.engine.service
        assert not service.closed
    assert service.closed
    with LLM(str(tiny_model), dtype="float32", num_blocks=9) as anew:
        assert anew.engine.service is not service
        assert ids_of(anew.generate(PROMPT, GREEDY)[0]) == ids_of(expected[0])


def test_many_threads_that_start_at_once_get_one_engine(tiny_model: Path) -> None:
    gate = threading.Barrier(8)

    def start(_: int) -> LLM:
        gate.wait()
        return LLM(str(tiny_model), dtype="float32", num_blocks=11)

    with ThreadPoolExecutor(8) as pool:
        llms = list(pool.map(start, range(8)))
    services = {id(llm.engine.service): llm.engine.service for llm in llms}
    assert len(services) == 1
    for llm in llms[:-1]:
        llm.close()
    assert len(ids_of(llms[-1].generate(PROMPT, GREEDY)[0])) == 12
    llms[-1].close()
    assert next(iter(services.values())).closed


def test_after_close_everything_says_so(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), dtype="float32", num_blocks=13)
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=300, ignore_eos=True))
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError, match="closed"):
        list(stream)
    for use in (
        lambda: llm.generate(PROMPT), lambda: llm.stream(PROMPT), lambda: llm.chat(QUESTION), lambda: llm.stats(),
        lambda: llm.tokenizer, lambda: llm.get_tokenizer(), lambda: llm.engine,
    ):  # fmt: skip
        with pytest.raises(EngineClosedError, match="make a new"):
            use()


def test_a_start_that_fails_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    for model, settings in ((tmp_path, {}), (tiny_model, {"max_model_len": 513}), (tiny_model, {"quantization": "x"})):
        with pytest.raises((ConfigError, OSError, ValueError)):
            LLM(str(model), **settings)
    assert threading.active_count() == before


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_after_a_preemption(
    tiny_model: Path, temperature: float
) -> None:
    """Six requests of up to 10 blocks share 11: they keep throwing each other out."""
    prompts = [[(i * j) % 290 + 2 for i in range(25 + j)] for j in (3, 5, 7, 11, 13, 17)]
    params = [SamplingParams(temperature=temperature, max_tokens=40, ignore_eos=True, seed=s, n=2) for s in range(6)]
    with LLM(str(tiny_model), dtype="float32", num_blocks=12, block_size=16) as llm:
        alone = [llm.generate(prompt, param)[0] for prompt, param in zip(prompts, params, strict=True)]
        assert llm.stats().preemptions == 0
        together = llm.generate(prompts, params)
        assert llm.stats().preemptions > 3
        assert sum(output.metrics.preemptions for output in together) == llm.stats().preemptions
    for one, other in zip(alone, together, strict=True):
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
    if temperature:
        assert len({tuple(o.token_ids) for output in alone for o in output.outputs}) == 12


def test_hugging_faces_tokenizer_is_at_hand(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer(PROMPT)["input_ids"] == llm.tokenizer.encode(PROMPT)
    assert tokenizer.decode(llm.tokenizer.encode(PROMPT)) == PROMPT
