"""Encoder-decoders: numbers and tokens as transformers has them, in whatever batch; sources that are encoded once,
shared and given back."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver
from octavo import SamplingParams
from octavo.attention.texts import TextBatch
from octavo.engine.request import Request
from octavo.errors import ModelFileError
from octavo.models.config import Fields
from octavo.models.seq2seq_config import parse_seq2seq_config
from tiny_seq2seq import FAMILIES, LENGTH, VOCABULARY, Seq2SeqParts, make_seq2seq

MAX_TOKENS = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (transformers' model, ours), each made once."""

    @cache
    def make(name: str, spread: float = 1.0) -> tuple[Any, Seq2SeqParts]:
        folder = tmp_path_factory.mktemp(name)
        return make_seq2seq(name, folder, spread=spread), Seq2SeqParts(folder)

    return make


def sources(count: int, seed: int = 0, longest: int = 50) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY - 1) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def add(driver: Driver, parts: Seq2SeqParts, source: list[int], forced: int | None = None, **params: Any) -> Request:
    settings = {"temperature": 0.0, "max_tokens": MAX_TOKENS} | params
    prompt = [parts.config.decoder_start_token_id, *([] if forced is None else [forced])]
    return driver.add(
        prompt, SamplingParams(**settings), eos=parts.config.eos_token_ids, source=source,
        bad_words=parts.config.bad_word_ids, offset=len(prompt) - 1,
    )  # fmt: skip


def theirs(
    model: Any, *batch: list[int], forced: int | None = None, penalty: float = 1.0, beams: int = 1, **options: Any
) -> list[list[int]]:
    """What transformers makes of sources, without what the decoder begins with."""
    longest = max(map(len, batch))
    pad, end = model.config.pad_token_id, model.config.eos_token_id
    ids = torch.tensor([source + [pad] * (longest - len(source)) for source in batch])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in batch])
    given = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=MAX_TOKENS + (forced is not None), num_beams=beams,
        do_sample=False, forced_bos_token_id=forced, repetition_penalty=penalty, **options,
    )  # fmt: skip
    outputs = given[:, 1 + (forced is not None) :].tolist()
    return [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in outputs]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_logits_are_those_of_transformers(made: Any, name: str) -> None:
    model, parts = made(name, 0.4)
    batch = sources(12, seed=3)
    cpu, skipped = torch.device("cpu"), parts.model.positions_skip_padding
    with torch.inference_mode():
        ours = parts.model.encode(TextBatch(batch, pad_token_id=skipped, dtype=torch.float32, device=cpu))
        begin = 0
        for source in batch:
            expected = model.get_encoder()(input_ids=torch.tensor([source])).last_hidden_state[0]
            torch.testing.assert_close(ours[begin : begin + len(source)], expected, atol=1e-4, rtol=0)
            begin += len(source)
    driver = Driver(parts.core(), record=True)
    requests = [add(driver, parts, source) for source in batch]
    driver.run()
    for source, request in zip(batch, requests, strict=True):
        tokens = driver.tokens[request.request_id, 0]
        decoder = torch.tensor([[parts.config.decoder_start_token_id, *tokens[:-1]]])
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0]
        found = driver.logits[request.request_id, 0]
        torch.testing.assert_close(torch.stack([found[place] for place in sorted(found)]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_in_any_batch(made: Any, name: str) -> None:
    model, parts = made(name)
    batch = sources(100)
    options = [(None, 1.0), (17, 1.0), (None, 3.0), (90, 3.0)]
    expected: list[list[int]] = []
    for place, (forced, penalty) in enumerate(options):
        expected += theirs(model, *batch[25 * place : 25 * place + 25], forced=forced, penalty=penalty)
    assert len({tuple(tokens) for tokens in expected}) > 80
    assert sum(len(set(tokens)) for tokens in expected) > 500
    preemptions = 0
    for seed in range(3):
        rng = random.Random(seed)
        settings = {
            "num_blocks": rng.choice([12, 14, 30]), "block_size": rng.choice([8, 16]),
            "max_num_seqs": rng.choice([2, 5, 16]), "budget": rng.choice([16, 30, 100]), "depth": seed % 2,
        }  # fmt: skip
        driver = Driver(parts.core(**settings, caching=rng.random() < 0.5))
        order = rng.sample(range(100), 100)
        requests: dict[int, Request] = {}
        while order or not driver.core.idle:
            for _ in range(min(rng.randrange(6), len(order))):
                place = order.pop()
                forced, penalty = options[place // 25]
                requests[place] = add(driver, parts, batch[place], forced, repetition_penalty=penalty)
            driver.core.step()
        assert driver.core.scheduler.pool.used == 0
        assert not driver.errors
        for place, request in requests.items():
            assert driver.tokens[request.request_id, 0] == expected[place], (name, settings, place)
        preemptions += driver.core.scheduler.preemptions
    assert preemptions > 0


def test_tokens_that_the_model_must_not_make_are_never_made(made: Any, tmp_path: Path) -> None:
    """Marian forbids its padding, which it hardly likes anyway: here it may not make what it likes most."""
    batch = sources(8, seed=5)
    free = theirs(made("marian")[0], *batch)
    liked = [token for token, _ in Counter(token for tokens in free for token in tokens).most_common(3)]
    runs = (list(run) for tokens in free for run in pairwise(tokens) if {*liked}.isdisjoint(run))
    run = next(run for run in runs if run[0] != run[1])
    model = make_seq2seq("marian", tmp_path)
    model.generation_config.bad_words_ids = [*([token] for token in liked), run]
    model.generation_config.save_pretrained(tmp_path)
    parts = Seq2SeqParts(tmp_path)
    assert (parts.config.never_ids, parts.config.bad_word_ids) == (tuple(liked), (tuple(run),))
    driver = Driver(parts.core())
    searched = {"use_beam_search": True, "beam_width": 3}
    settings: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.5}, searched, searched | {"repetition_penalty": 1.5}]
    asked = [[add(driver, parts, source, **params) for source in batch] for params in settings]
    driver.run()
    for params, requests in zip(settings, asked, strict=True):
        beams, penalty = params.get("beam_width", 1), params.get("repetition_penalty", 1.0)
        found = [driver.tokens[request.request_id, 0] for request in requests]
        assert found == theirs(model, *batch, beams=beams, penalty=penalty)
        assert found != free
        assert {*liked}.isdisjoint(token for tokens in found for token in tokens)


SEARCHES: list[dict[str, Any]] = [
    {"beams": 2}, {"beams": 4, "forced": 17}, {"beams": 5, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
    {"beams": 4, "early_stopping": True, "length_penalty": -1.0}, {"beams": 1, "forced": 90},
    {"beams": 4, "penalty": 3.0, "early_stopping": "never"},
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_are_those_of_transformers_in_any_batch(made: Any, name: str) -> None:
    model, parts = made(name)
    batch = sources(60, seed=12)
    expected: list[list[int]] = []
    for place, search in enumerate(SEARCHES):
        expected += theirs(model, *batch[10 * place : 10 * place + 10], **search)
    preemptions = 0
    for seed in range(2):
        rng = random.Random(seed)
        driver = Driver(parts.core(num_blocks=[30, 80][seed], max_num_seqs=[5, 16][seed], budget=30, depth=seed))
        order = rng.sample(range(60), 60)
        requests: dict[int, Request] = {}
        while order or not driver.core.idle:
            for _ in range(min(rng.randrange(4), len(order))):
                place = order.pop()
                search = dict(SEARCHES[place // 10])
                width, forced = search.pop("beams"), search.pop("forced", None)
                penalty = search.pop("penalty", 1.0)
                beams = {"use_beam_search": True, "beam_width": width, **search}
                requests[place] = add(driver, parts, batch[place], forced, repetition_penalty=penalty, **beams)
            driver.core.step()
        assert driver.core.scheduler.pool.used == 0
        assert not driver.errors
        for place, request in requests.items():
            assert driver.tokens[request.request_id, 0] == expected[place], (SEARCHES[place // 10], place)
        preemptions += driver.core.scheduler.preemptions
    assert preemptions > 0


def test_a_source_is_encoded_once(made: Any) -> None:
    _, parts = made("m2m100")
    driver = Driver(parts.core())
    source, other = sources(2, seed=5)
    encoded: list[int] = []
    encode = parts.model.encode

    def counting(batch: TextBatch) -> torch.Tensor:
        encoded.append(batch.count)
        return encode(batch)

    parts.model.encode = counting  # type: ignore[method-assign]
    try:
        first = [add(driver, parts, source) for _ in range(3)]  # one after the other in one step
        driver.run()
        assert encoded == [1]
        again = add(driver, parts, source)
        driver.run()
        assert encoded == [1]
        assert again.metrics.cached_tokens >= len(source)
        add(driver, parts, other)
        driver.run()
        assert encoded == [1, 1]
    finally:
        del parts.model.encode
    assert driver.core.scheduler.sources.hits == 3
    outputs = {tuple(driver.tokens[request.request_id, 0]) for request in [*first, again]}
    assert len(outputs) == 1


def test_salts_and_sources_keep_caches_apart(made: Any) -> None:
    """Equal tokens of the decoder have other keys and values under another source."""
    model, parts = made("m2m100")
    driver = Driver(parts.core(block_size=8))
    for source in sources(20, seed=9, longest=12):
        request = add(driver, parts, source)
        driver.run()
        assert driver.tokens[request.request_id, 0] == theirs(model, source)[0]
    hits = driver.core.scheduler.sources.hits
    for salt in ("", "me", "you"):
        request = Request(
            salt or "none", [2], SamplingParams(temperature=0.0, max_tokens=4), lambda event: None, max_tokens=4,
            source_ids=[5, 6, 7], cache_salt=salt,
        )  # fmt: skip
        driver.core.scheduler.add(request)
        driver.run()
    assert driver.core.scheduler.sources.hits == hits


@pytest.mark.parametrize("depth", [0, 1])
def test_all_outputs_of_a_request_read_one_source(made: Any, depth: int) -> None:
    model, parts = made("t5")
    driver = Driver(parts.core(depth=depth))
    source = sources(1, seed=2, longest=40)[0]
    request = add(driver, parts, source, n=6, temperature=1.0, ignore_eos=True)
    driver.core.step()
    size, pool = driver.core.scheduler.pool.block_size, driver.core.scheduler.pool
    assert request.source is not None
    assert len(request.source.blocks) == -(-len(source) // size)
    driver.core.step()
    assert pool.used == len(request.source.blocks) + len({b for s in request.sequences for b in s.blocks})
    driver.run()
    outputs = {tuple(driver.tokens[request.request_id, index]) for index in range(6)}
    assert len(outputs) > 1
    seeds = add(driver, parts, source, n=6, temperature=1.0, ignore_eos=True)
    driver.run()
    assert {tuple(driver.tokens[seeds.request_id, index]) for index in range(6)} == outputs
    greedy = add(driver, parts, source, n=3)
    driver.run()
    for index in range(3):
        assert driver.tokens[greedy.request_id, index] == theirs(model, source)[0]


def test_a_cancelled_request_gives_its_source_back(made: Any) -> None:
    _, parts = made("m2m100")
    driver = Driver(parts.core(caching=False))
    pool = driver.core.scheduler.pool
    one, two = (add(driver, parts, source, n=2, ignore_eos=True) for source in sources(2, seed=4))
    driver.core.step()
    driver.core.step()
    before = pool.used
    driver.core.abort(one, 0)
    assert one.source is not None
    held = len(one.source.blocks)
    assert held > 0
    driver.core.abort(one, None)
    assert not one.source.blocks
    assert pool.used <= before - held
    driver.core.abort(two, None)
    assert pool.used == 0
    assert pool.available == pool.capacity


def test_a_source_that_breaks_fails_alone(made: Any) -> None:
    model, parts = made("m2m100")
    batch = sources(6, seed=11)
    encode = parts.model.encode
    for how in ("raises", "nan"):
        driver = Driver(parts.core())

        def breaking(texts: TextBatch, how: str = how) -> torch.Tensor:
            out = encode(texts)
            bad = [place for place in range(texts.count) if texts.ids[texts.starts[place]] == batch[2][0]]
            if bad and how == "raises":
                raise ValueError("a bad source")
            for place in bad:
                out[texts.starts[place] : texts.ends[place]] = float("nan")
            return out

        parts.model.encode = breaking  # type: ignore[method-assign]
        try:
            requests = [add(driver, parts, source) for source in [*batch, batch[2]]]
            driver.run()
        finally:
            del parts.model.encode
        failed = {place for place, request in enumerate(requests) if (request.request_id, 0) in driver.errors}
        assert failed == {2, 6}
        for place in set(range(6)) - failed:
            assert driver.tokens[requests[place].request_id, 0] == theirs(model, batch[place])[0]
        again = [add(driver, parts, source) for source in batch]
        driver.run()
        for source, request in zip(batch, again, strict=True):
            assert driver.tokens[request.request_id, 0] == theirs(model, source)[0]


def test_more_sources_than_a_step_encodes(made: Any) -> None:
    """Long ones come alone, and nobody starves."""
    model, parts = made("marian")
    driver = Driver(parts.core(budget=16, max_num_seqs=8))
    batch = [*sources(10, seed=1, longest=LENGTH), *sources(10, seed=2, longest=4)]
    requests = [add(driver, parts, source) for source in batch]
    driver.run()
    for source, request in zip(batch, requests, strict=True):
        assert driver.tokens[request.request_id, 0] == theirs(model, source)[0]


def test_log_probabilities_are_of_the_raw_logits(made: Any) -> None:
    """Those of Marian count the padding token, which is never made."""
    model, parts = made("marian")
    driver = Driver(parts.core())
    source = sources(1, seed=8)[0]
    request = add(driver, parts, source, logprobs=3, prompt_logprobs=0)
    driver.run()
    tokens = driver.tokens[request.request_id, 0]
    assert parts.config.pad_token_id not in tokens
    decoder = torch.tensor([[parts.config.decoder_start_token_id, *tokens[:-1]]])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0]
    expected = torch.log_softmax(logits, -1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    found = torch.tensor([raw.logprob for raw in driver.logprobs[request.request_id, 0]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# -- configurations --------------------------------------------------------------------------------------------------

SOUND: dict[str, dict[str, Any]] = {
    "m2m_100": {"architectures": ["M2M100ForConditionalGeneration"], "vocab_size": 100, "d_model": 32},
    "marian": {
        "architectures": ["MarianMTModel"], "vocab_size": 100, "pad_token_id": 9, "decoder_start_token_id": 9,
    },
    "t5": {"architectures": ["T5ForConditionalGeneration"], "vocab_size": 100, "num_heads": 4},
}  # fmt: skip


def read(kind: str, changes: dict[str, Any], generation: dict[str, Any] | None = None) -> Any:
    return parse_seq2seq_config(Fields(SOUND[kind] | changes, "config.json"), Fields(generation or {}, "generation"))


@pytest.mark.parametrize(("kind", "changes", "field"), [
    ("m2m_100", {"d_model": 33}, "d_model"), ("m2m_100", {"decoder_attention_heads": 5}, "d_model"),
    ("m2m_100", {"vocab_size": None}, "vocab_size"), ("m2m_100", {"vocab_size": 2}, "vocab_size"),
    ("m2m_100", {"encoder_layers": -1}, "encoder_layers"), ("m2m_100", {"d_model": "big"}, "d_model"),
    ("m2m_100", {"activation_function": "swiglu"}, "activation_function"),
    ("m2m_100", {"quantization_config": {}}, "quantization_config"),
    ("m2m_100", {"architectures": "x"}, "architectures"), ("m2m_100", {"architectures": ["B"]}, "architectures"),
    ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
    ("marian", {"bad_words_ids": [3]}, "bad_words_ids"), ("marian", {"bad_words_ids": [[]]}, "bad_words_ids"),
    ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj"),
    ("t5", {"relative_attention_num_buckets": 30}, "relative_attention_num_buckets"),
    ("t5", {"relative_attention_max_distance": 10}, "relative_attention_num_buckets"),
    ("t5", {"eos_token_id": 100}, "vocab_size"),
])  # fmt: skip
def test_bad_configurations_are_named(kind: str, changes: dict[str, Any], field: str) -> None:
    assert read(kind, {})
    with pytest.raises(ModelFileError) as caught:
        read(kind, changes)
    assert caught.value.field == field


def test_generation_settings_win() -> None:
    given = {"forced_bos_token_id": 7, "bad_words_ids": [[9], [1, 2]], "eos_token_id": [3, 4], "num_beams": 5}
    config = read("marian", {"bad_words_ids": [[5]], "eos_token_id": 0}, given)
    assert config.forced_bos_token_id == 7
    assert (config.never_ids, config.bad_word_ids) == ((9,), ((1, 2),))
    assert config.eos_token_ids == (3, 4, 0)
    assert read("t5", {"tie_word_embeddings": False}).scales_head is False
    assert read("t5", {}).scales_head is True
