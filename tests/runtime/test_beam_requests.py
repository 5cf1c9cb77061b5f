"""Beam search as its callers see it: outputs and scores, streams, memory, cancellation, failures."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from octavo.errors import RequestError, RequestFailedError
from safetensors.torch import load_file, save_file
from tiny_models import make_model

PROMPT = "The quick brown fox"
NAN = 250


def search(**settings: Any) -> SamplingParams:
    return SamplingParams(**({"use_beam_search": True, "beam_width": 4, "max_tokens": 24} | settings))


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), dtype="float32") as llm:
        yield llm
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def test_outputs_come_best_first_with_their_scores(llm: LLM) -> None:
    output = llm.generate(PROMPT, search(n=4, length_penalty=0.7, ignore_eos=True))[0]
    assert [choice.index for choice in output.outputs] == [0, 1, 2, 3]
    scores = [choice.score or 0.0 for choice in output.outputs]
    assert scores == sorted(scores, reverse=True)
    for choice in output.outputs:
        assert choice.score == pytest.approx((choice.cumulative_logprob or 0.0) / 24**0.7, rel=1e-5)
        assert choice.text == llm.tokenizer.decode(choice.token_ids)
        assert choice.logprobs is None
        assert choice.finish_reason == "length"
    assert output.metrics.output_tokens == 4 * 24
    one = llm.generate(PROMPT, search(length_penalty=0.7, ignore_eos=True))[0].outputs
    assert [choice.token_ids for choice in one] == [output.outputs[0].token_ids]


def test_the_sum_is_that_of_the_tokens_log_probabilities(llm: LLM) -> None:
    """Seen with the model's eyes: the same text as a prompt has these log-probabilities."""
    output = llm.generate(PROMPT, search(ignore_eos=True, max_tokens=9))[0]
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    again = llm.generate(ids, SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert again is not None
    seen = [entry[token].logprob for token, entry in zip(ids, again, strict=True) if entry is not None]
    assert sum(seen[-9:]) == pytest.approx(output.outputs[0].cumulative_logprob, abs=1e-4)


def test_beam_search_has_the_shape_of_vllm(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=10, length_penalty=0.5)
    plain = llm.generate([PROMPT, [5, 6, 7]], search(beam_width=3, n=3, max_tokens=10, length_penalty=0.5))
    for found, output in zip(llm.beam_search([PROMPT, [5, 6, 7]], params), plain, strict=True):
        assert len(found.sequences) == 3
        for sequence, choice in zip(found.sequences, output.outputs, strict=True):
            assert sequence.tokens == output.prompt_token_ids + choice.token_ids
            assert sequence.text == llm.tokenizer.decode(sequence.tokens)
            assert (sequence.cum_logprob, sequence.score) == (choice.cumulative_logprob, choice.score)
    alone = llm.beam_search(PROMPT, BeamSearchParams(beam_width=1, max_tokens=10))[0].sequences[0]
    greedy = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=10, logprobs=0))[0]
    assert alone.tokens == greedy.prompt_token_ids + greedy.outputs[0].token_ids
    assert alone.cum_logprob == greedy.outputs[0].cumulative_logprob
    assert alone.score == pytest.approx(alone.cum_logprob / 10)
    for bad in (None, SamplingParams(), {"beam_width": 3}):
        with pytest.raises(RequestError, match="params"):
            llm.beam_search(PROMPT, bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="beam_width"):
        llm.beam_search(PROMPT, BeamSearchParams(beam_width=0, max_tokens=10))
    with pytest.raises(RequestError, match="temperature"):
        llm.beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=10, temperature=0.3))


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_gives_what_is_settled_and_ends_with_the_output(llm: LLM, n: int) -> None:
    params = search(n=n, max_tokens=60, ignore_eos=True, no_repeat_ngram_size=3)
    whole = llm.generate(PROMPT, params)[0]
    pieces = list(llm.stream(PROMPT, params))
    for index, choice in enumerate(whole.outputs):
        mine = [piece for piece in pieces if piece.index == index]
        assert [token for piece in mine for token in piece.token_ids] == choice.token_ids
        assert "".join(piece.text for piece in mine) == choice.text
        assert len(mine) > 3, "nothing came before the end"
    last = pieces[-1].output
    assert last is not None
    assert [choice.score for choice in last.outputs] == [choice.score for choice in whole.outputs]


def test_four_beams_hold_little_more_than_one(tmp_path: Path) -> None:
    """A prompt of 512 tokens and 64 new ones, by the counter of the engine."""
    path = make_model("llama2-mha", tmp_path, max_position_embeddings=1024)
    peaks = []
    for width in (1, 4):
        with LLM(str(path), dtype="float32", seed=width) as llm:
            prompt = [2 + i * i % 290 for i in range(512)]
            output = llm.generate(prompt, search(beam_width=width, max_tokens=64, ignore_eos=True))[0]
            assert len(output.outputs[0].token_ids) == 64
            peaks.append(llm.stats().blocks_peak)
    assert 512 // llm_block_size(path) < peaks[0] <= peaks[1] < 1.35 * peaks[0]


def llm_block_size(path: Path) -> int:
    with LLM(str(path), dtype="float32") as llm:
        return llm.engine.limits.block_size


def test_a_search_that_is_left_gives_back_its_blocks(llm: LLM) -> None:
    stream = llm.stream(PROMPT, search(beam_width=8, max_tokens=400, ignore_eos=True))
    next(stream)
    assert llm.stats().running > 1
    stream.close()
    until = time.monotonic() + 10
    while llm.stats().blocks_used and time.monotonic() < until:
        time.sleep(0.01)
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    output = stream.output
    assert not output.finished


def test_asyncio_searches_and_cancels(tiny_model: Path) -> None:
    async def main() -> None:
        async with await AsyncLLM.create(str(tiny_model), dtype="float32") as llm:
            params = search(n=2, max_tokens=30)
            whole = (await llm.generate(PROMPT, params))[0]
            pieces = [piece async for piece in llm.stream(PROMPT, params)]
            assert pieces[-1].output is not None
            assert [c.token_ids for c in pieces[-1].output.outputs] == [c.token_ids for c in whole.outputs]
            found = await llm.beam_search([PROMPT], BeamSearchParams(beam_width=4, max_tokens=30))
            assert found[0].sequences[0].tokens[len(whole.prompt_token_ids) :] == whole.outputs[0].token_ids
            task = asyncio.create_task(llm.generate(PROMPT, search(max_tokens=400, ignore_eos=True)))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(500):
                stats = await asyncio.to_thread(llm.stats)
                if not stats.blocks_used:
                    break
                await asyncio.sleep(0.01)
            assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)

    asyncio.run(main())


def test_one_broken_beam_ends_its_search_and_nobody_else(tiny_model: Path, tmp_path: Path) -> None:
    """Token 250 makes whoever takes it NaN. Some beam of a search takes it, early or late; its neighbours' do not."""
    shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    good = search(n=2, ignore_eos=True, logit_bias={NAN: -1e4})
    with LLM(str(tmp_path / "model"), dtype="float32", num_blocks=60, block_size=16) as llm:
        prompts = [[3 + i, 40, 9 * i + 2] for i in range(6)]
        expected = [llm.generate(prompt, good)[0] for prompt in prompts]
        bad = [search(n=2, ignore_eos=True, logit_bias={NAN: bias}) for bias in (2.0, 3.0)]
        params = [good, bad[0], good, good, bad[1], good]
        outputs: list[Any] = llm.generate(prompts, params, return_exceptions=True)
        for place, output in enumerate(outputs):
            if params[place] is good:
                assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected[place].outputs]
            else:
                assert isinstance(output, RequestFailedError)
                assert "not finite" in str(output)
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def test_fewer_outputs_than_asked_for_is_an_error_that_says_so(llm: LLM) -> None:
    """With two tokens there are two outputs of one token, and four of two."""
    few = {"allowed_token_ids": [5, 6], "ignore_eos": True}
    assert len(llm.generate(PROMPT, search(n=4, max_tokens=2, **few))[0].outputs) == 4
    with pytest.raises(RequestFailedError, match="only 2 could be made"):
        llm.generate(PROMPT, search(n=4, max_tokens=1, **few))
