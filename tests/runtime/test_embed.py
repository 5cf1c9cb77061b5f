"""Embeddings: equal to those of sentence-transformers on the real MiniLM, and to transformers for the other families;
callers share batches, and an error stays with its text."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo import (
    LLM,
    AsyncLLM,
    ConfigError,
    EngineClosedError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    UnsupportedModelError,
)
from octavo.embedding import embed_requests
from octavo.engine import registry
from octavo.engine.embed_core import BatchLimits, EmbedCore
from octavo.engine.embed_request import EmbedEvent, EmbedRequest
from octavo.models.sources import EMBEDDING_MODEL, resolve
from tiny_encoders import FAMILIES, POOLINGS, make_encoder, pooled

TEXTS = [
    "Hello world", "", "a", " padded  ", "Größe, naïve, 日本語 🙂", "x" * 700, "The quick brown fox. " * 200,
    "A tokenizer cuts text into pieces.\nOne, two, three.", "UPPER lower MiXeD", "[CLS] and [SEP] as text", "?!",
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(EMBEDDING_MODEL) as llm:
        yield llm


def vectors(outputs: Any) -> np.ndarray:
    return np.array([output.embedding for output in outputs])


def test_equal_to_sentence_transformers(llm: LLM) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(llm.engine.files.path), device="cpu")
    many = [*TEXTS, *(f"Sentence {n}: " + "word " * (n % 40) for n in range(90))]
    expected = reference.encode(many)
    outputs = llm.embed(many)
    assert np.abs(vectors(outputs) - expected).max() < 1e-5
    for place in (1, 4, 6):  # alone, padded by nobody
        assert np.abs(vectors(llm.embed(many[place]))[0] - expected[place]).max() < 1e-5
    assert [output.truncated for output in outputs[:7]] == [False] * 6 + [True]
    assert len(outputs[6].prompt_token_ids) == llm.engine.limits.max_model_len


def test_half_the_bits_are_near() -> None:
    with LLM(EMBEDDING_MODEL, dtype="bfloat16") as half, LLM(EMBEDDING_MODEL) as full:
        one, other = vectors(half.embed(TEXTS[:5])), vectors(full.embed(TEXTS[:5]))
    assert (one * other).sum(axis=1).min() > 0.999
    assert not np.array_equal(one, other)


async def test_concurrent_callers_share_batches() -> None:
    with LLM(EMBEDDING_MODEL) as sync:
        async with await AsyncLLM.create(EMBEDDING_MODEL) as llm:
            assert llm.engine is sync.engine
            before = llm.stats().steps
            results = await asyncio.gather(*(llm.embed(f"text {n}") for n in range(40)))
            stats = llm.stats()
            assert stats.steps - before < 20
            assert stats.largest_batch > 4
            expected = vectors(sync.embed([f"text {n}" for n in range(40)]))
            assert np.abs(vectors([one for (one,) in results]) - expected).max() < 1e-6


def test_bad_texts_and_wrong_models(llm: LLM, tiny_model: Path) -> None:
    bad_texts = (([3], "text 0"), (["a", None], "text 1"), (b"a", "bytes"), (4, "int"), (["\ud800"], "surrogates"))
    for bad, word in bad_texts:
        with pytest.raises(RequestError, match=word):
            llm.embed(bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="prompt"):
        llm.embed("a", prompt_name="query")
    with pytest.raises(RequestError, match="embed"):
        llm.generate("Hello")
    assert llm.embed([]) == []
    with LLM(str(tiny_model)) as text, pytest.raises(RequestError, match="minilm"):
        text.embed("Hello")
    for setting in ({"num_blocks": 4}, {"quantization": "int8"}, {"max_model_len": 4096}, {"deterministic": True}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            LLM(EMBEDDING_MODEL, **setting)
    assert len(llm.embed("still here")[0].embedding) == 384


def test_a_text_on_which_the_model_fails_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = llm.engine.service.call(lambda core: core.encoder)
    encode = encoder.encode
    poison = llm.embed("poison")[0].prompt_token_ids

    def flaky(texts: Any) -> Any:
        if poison in [list(text) for text in texts]:
            raise RuntimeError("out of luck")
        return encode(texts)

    monkeypatch.setattr(encoder, "encode", flaky)
    outputs = llm.embed(["one", "poison", "two"], return_exceptions=True)
    assert "out of luck" in str(outputs[1])
    assert np.abs(vectors([outputs[0], outputs[2]])).max() > 0
    with pytest.raises(Exception, match="out of luck"):
        llm.embed("poison")


def test_close_ends_what_waits_and_gives_the_engine_back() -> None:
    llm = LLM(EMBEDDING_MODEL, max_num_batched_tokens=64)
    config = llm.engine.config
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                llm.embed(["some text " * 20] * 20)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while llm.stats().steps < 3:
        time.sleep(0.01)
    llm.close()
    thread.join(30)
    assert isinstance(errors[0], EngineClosedError)
    assert config not in registry.running()


async def test_a_cancelled_task_leaves_nothing() -> None:
    async with await AsyncLLM.create(EMBEDDING_MODEL, max_num_batched_tokens=64) as llm:
        task = asyncio.create_task(llm.embed(["long text " * 30] * 200))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert llm.stats().waiting == 0
        assert len((await llm.embed("next"))[0].embedding) == 384


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("mode", POOLINGS)
def test_families_and_poolings_equal_transformers(kind: str, mode: str, tmp_path: Path) -> None:
    model = make_encoder(kind, mode, tmp_path)
    texts = ["The quick brown fox", "dog", "Numbers such as 1, 12 and 123 are written with digits."]
    with LLM(str(tmp_path)) as llm:
        outputs = llm.embed(texts)
    for output in outputs:
        expected = pooled(model, output.prompt_token_ids, mode)
        np.testing.assert_allclose(output.embedding, expected.numpy(), atol=2e-5)


def test_what_is_not_implemented_is_named(tmp_path: Path) -> None:
    source = resolve(EMBEDDING_MODEL).path
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".md":
            shutil.copy(path, tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    config = json.loads((source / "1_Pooling" / "config.json").read_text())
    modules = json.loads((source / "modules.json").read_text())
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (tmp_path / "modules.json").unlink()
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(UnsupportedModelError, match="Dense"):
        LLM(str(tmp_path))


def test_a_caller_that_is_gone_harms_nobody(llm: LLM) -> None:
    """Its event loop was closed while its text waited: nobody can be told, and the engine serves the others."""
    loop = asyncio.new_event_loop()
    loop.close()

    def sink(place: int, event: EmbedEvent) -> None:
        loop.call_soon_threadsafe(print)

    (group,) = embed_requests(llm.engine, ["gone", "gone too"], None, sink)
    for request in group:
        llm.engine.service.submit(request)
    assert len(llm.embed("still here")[0].embedding) == 384


async def test_a_long_list_leaves_the_loop_and_the_queue_alone() -> None:
    """More texts than may wait: they come as there is room, and other tasks have their turn meanwhile."""
    async with await AsyncLLM.create(EMBEDDING_MODEL, max_queued_requests=8) as llm:
        turns = 0
        most = 0

        async def others() -> None:
            nonlocal turns, most
            while True:
                turns += 1
                most = max(most, llm.engine.service._backlog())
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        outputs = await llm.embed([f"text {n}" for n in range(200)])
        task.cancel()
    assert len(outputs) == 200
    assert 0 < most <= 8
    assert turns >= 200 // 32


def test_a_full_queue_refuses_those_who_do_not_wait() -> None:
    with LLM(EMBEDDING_MODEL, max_queued_requests=2) as small:
        assert len(small.embed(["a"] * 30)) == 30
        entered, leave = threading.Event(), threading.Event()

        def hold(core: Any) -> None:
            entered.set()
            assert leave.wait(60)

        holder = threading.Thread(target=small.engine.service.call, args=[hold])
        holder.start()
        assert entered.wait(60)
        (group,) = embed_requests(small.engine, ["a", "b", "c"], None, lambda place, event: None)
        for request in group[:2]:
            small.engine.service.submit(request)
        with pytest.raises(QueueFullError):
            small.engine.service.submit(group[2])
        leave.set()
        holder.join()


def test_one_that_waits_longest_is_in_the_next_batch() -> None:
    """Texts of like length go together; the oldest never waits for a better company."""
    seen: list[list[int]] = []

    class Recorder:
        def encode(self, texts: Any) -> list[Any]:
            seen.append([len(text) for text in texts])
            return [None] * len(texts)

    core = EmbedCore(Recorder(), BatchLimits(tokens=40, texts=4))
    for number, length in enumerate([7, 10, 1, 2, 2, 50, 9, 2]):
        core.add(EmbedRequest(str(number), [5] * length, lambda event: None))
    while not core.idle:
        core.step()
    assert seen[0][:3] == [10, 9, 7]
    assert [50] in seen
    assert sorted(length for batch in seen for length in batch) == [1, 2, 2, 2, 7, 9, 10, 50]
    assert all(len(batch) <= 4 and (len(batch) == 1 or len(batch) * max(batch) <= 40) for batch in seen)


def test_generating_doors_say_what_to_use(llm: LLM) -> None:
    for call in (lambda: llm.generate("word " * 400), lambda: llm.chat([{"role": "user", "content": "Hi"}])):
        with pytest.raises(RequestError, match=r"use embed\(\)"):
            call()


def test_what_is_not_finite_fails_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = resolve(EMBEDDING_MODEL).path
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    with LLM(EMBEDDING_MODEL) as whole:
        poison = whole.embed("poison")[0].prompt_token_ids[1]
    weights["embeddings.word_embeddings.weight"][poison] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with LLM(str(tmp_path)) as llm:
        outputs: list[Any] = llm.embed(["one", "poison", "two"], return_exceptions=True)
        assert isinstance(outputs[1], RequestFailedError)
        assert np.isfinite(vectors([outputs[0], outputs[2]])).all()
