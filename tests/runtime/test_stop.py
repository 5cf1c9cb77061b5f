"""Where an output ends: stop strings, stop tokens, end of sequence, `min_tokens`; and what of it is text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo import LLM, SamplingParams
from octavo.decode.stop import StopStrings

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), dtype="float32") as llm:
        yield llm


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab<|>", max_size=4), max_size=12),
    stops=st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=4), include=st.booleans(),
)  # fmt: skip
def test_stop_strings_in_pieces_equal_a_search_in_the_whole(pieces: list[str], stops: list[str], include: bool) -> None:
    """The first to be complete ends the text; of several that are complete at once the earliest, then the longest."""
    found = StopStrings(stops, include=include)
    shown, whole = "", ""
    for piece in pieces:
        whole += piece
        shown += found.push(piece)
        hits = [(whole.index(stop), -len(stop), stop) for stop in stops if stop in whole]
        if hits:
            place, _, stop = min(hits)
            assert found.found == stop
            assert shown == whole[: place + len(stop) if include else place]
            return
        assert found.found is None
        assert whole.startswith(shown)
        held = whole[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops), "text is held back without need"
    assert shown + found.flush() == whole


def test_the_text_ends_before_the_stop_string_or_after_it(llm: LLM) -> None:
    whole = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))[0].outputs[0]
    rng = random.Random(1)
    for _ in range(20):
        begin = rng.randrange(len(whole.text) - 3)
        stop = whole.text[begin : begin + rng.randint(1, 4)]
        place = whole.text.index(stop)
        for include in (False, True):
            params = SamplingParams(
                temperature=0.0, max_tokens=40, ignore_eos=True, stop=["never comes", stop],
                include_stop_str_in_output=include,
            )  # fmt: skip
            (output,) = llm.generate(PROMPT, params)[0].outputs
            assert output.text == whole.text[: place + len(stop) if include else place]
            assert (output.finish_reason, output.stop_reason) == ("stop", stop)
            assert output.token_ids == whole.token_ids[: len(output.token_ids)]
            streamed = list(llm.stream(PROMPT, params))
            assert "".join(piece.text for piece in streamed) == output.text
            assert (streamed[-1].finish_reason, streamed[-1].stop_reason) == ("stop", stop)
    assert llm.stats().running == 0, "a request runs on after its stop string"


def test_stop_tokens_and_end_of_sequence(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    whole = llm.generate(PROMPT, free)[0].outputs[0].token_ids
    token = next(token for token in whole[5:] if token not in whole[:5])
    place = whole.index(token)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop_token_ids=[token])
    (output,) = llm.generate(PROMPT, params)[0].outputs
    assert output.token_ids == whole[: place + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    assert output.text == llm.tokenizer.decode(whole[:place])
    # the end-of-sequence token, forced by a bias after some tokens
    eos = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={1: 1e4})
    (output,) = llm.generate(PROMPT, eos)[0].outputs
    assert (output.token_ids, output.text, output.finish_reason, output.stop_reason) == ([1], "", "stop", None)
    (output,) = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=9, logit_bias={1: 1e4}, min_tokens=4))[
        0
    ].outputs
    assert 1 not in output.token_ids[:4]
    assert output.token_ids[4:] == [1]
    (output,) = llm.generate(
        PROMPT, SamplingParams(temperature=0.0, max_tokens=9, logit_bias={1: 1e4}, ignore_eos=True)
    )[0].outputs
    assert output.token_ids == [1] * 9
    assert output.finish_reason == "length"


def test_stop_strings_do_not_count_before_min_tokens(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    text = llm.generate(PROMPT, free)[0].outputs[0].text
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=list(set(text)), min_tokens=10)
    (output,) = llm.generate(PROMPT, params)[0].outputs
    assert len(output.token_ids) >= 10
    assert output.finish_reason == "stop"
    assert text.startswith(output.text)


def test_special_tokens_and_no_text_at_all(llm: LLM) -> None:
    params = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, "logit_bias": {1: 1e4}}
    assert llm.generate(PROMPT, SamplingParams(**params))[0].outputs[0].text == ""
    shown = llm.generate(PROMPT, SamplingParams(**params, skip_special_tokens=False))[0].outputs[0]
    assert shown.text == "</s>" * 4
    plain = SamplingParams(temperature=0.0, max_tokens=6)
    ids = llm.generate(PROMPT, plain)[0].outputs[0].token_ids
    none = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=6, detokenize=False))[0].outputs[0]
    assert (none.text, none.token_ids) == ("", ids)


def test_bad_words_are_never_made(llm: LLM) -> None:
    free = {"temperature": 1.3, "max_tokens": 60, "ignore_eos": True}
    seeds = range(8)
    texts = [llm.generate(PROMPT, SamplingParams(**free, seed=seed))[0].outputs[0].text for seed in seeds]
    common = sorted({c for c in "".join(texts) if c.isascii() and c.isalpha()}, key="".join(texts).count)[-4:]
    words = [f"{a}{b}" for a in common for b in common]
    assert any(word in text for word in words + common for text in texts), "nothing to forbid: a weak test"
    for seed in seeds:
        params = SamplingParams(**free, seed=seed, bad_words=[*words, *common])
        ids = llm.generate(PROMPT, params)[0].outputs[0].token_ids
        for word in common:
            (token,) = llm.tokenizer.encode(word, add_special_tokens=False)
            assert token not in ids
        for word in words:
            banned = llm.tokenizer.encode(word, add_special_tokens=False)
            assert all(ids[i : i + len(banned)] != banned for i in range(len(ids)))


def test_bad_words_of_several_tokens_forbid_only_their_last_token_after_the_others(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    ids = llm.generate(PROMPT, free)[0].outputs[0].token_ids
    for place in range(10, 28):
        text = llm.tokenizer.decode(ids[place : place + 2])
        if llm.tokenizer.encode(text, add_special_tokens=False) == ids[place : place + 2]:
            break
    else:
        raise AssertionError("no pair of tokens that is a word of two tokens")
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, bad_words=[text])
    made = llm.generate(PROMPT, params)[0].outputs[0].token_ids
    first = next(i for i in range(29) if ids[i : i + 2] == ids[place : place + 2])
    assert made[: first + 1] == ids[: first + 1], "the word's first token alone is allowed"
    assert made[first + 1] != ids[first + 1]
