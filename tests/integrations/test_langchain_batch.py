"""`batch` and its relatives: all inputs in one batch of the engine (the engine counts), each with its own run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.runnables.config import RunnableConfig
from langchain_octavo import ChatOctavo, OctavoLLM
from langchain_recorder import Recorder, at_rest
from octavo.errors import RequestError

TOKENS = 24
COUNT = 24
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "num_blocks": 257, "max_num_seqs": 32, "temperature": 0, "ignore_eos": True,
}  # fmt: skip
TEXTS = [f"Question {number}" for number in range(COUNT)]
TOO_LONG = "word " * 600


@pytest.fixture(scope="module", params=[ChatOctavo, OctavoLLM])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Any]:
    model = request.param(str(tiny_model), max_tokens=TOKENS, **SETTINGS)
    yield model
    assert at_rest(model.stats())
    model.close()


@pytest.fixture
def fresh(model: Any) -> Iterator[Any]:
    """With an engine that has run nothing yet: its `largest_batch` is the test's own."""
    fresh = type(model)(model.model, max_tokens=TOKENS, **SETTINGS, max_queued_requests=99)
    yield fresh
    fresh.close()


def text(answer: Any) -> str:
    return answer.text if isinstance(answer, AIMessage) else answer


@pytest.fixture(scope="module")
def expected(model: Any) -> list[str]:
    """The answers, one by one."""
    return [text(model.invoke(one)) for one in TEXTS]


@pytest.mark.parametrize("how", ["batch", "abatch", "batch_as_completed", "abatch_as_completed", "ainvoke", "threads"])
def test_all_inputs_run_in_one_batch(model: Any, expected: list[str], how: str) -> None:
    async def at_once() -> list[Any]:
        if how == "abatch":
            return await model.abatch(TEXTS)  # type: ignore[no-any-return]
        if how == "ainvoke":
            return await asyncio.gather(*(model.ainvoke(one) for one in TEXTS))
        found = {place: answer async for place, answer in model.abatch_as_completed(TEXTS)}
        return [found[place] for place in range(COUNT)]

    before = model.stats().steps
    if how == "batch":
        answers = model.batch(TEXTS)
    elif how == "batch_as_completed":
        found = dict(model.batch_as_completed(TEXTS))
        answers = [found[place] for place in range(COUNT)]
    elif how == "threads":
        answers = [None] * COUNT

        def ask(place: int) -> None:
            answers[place] = model.invoke(TEXTS[place])

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(COUNT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        answers = asyncio.run(at_once())
    assert [text(answer) for answer in answers] == expected
    ran_together(model, before)


def ran_together(model: Any, before: int) -> None:
    assert model.stats().steps - before < 3 * TOKENS, "they ran one after another"


def chain_of(number: int, model: Any) -> Any:
    return RunnableLambda(lambda _: TEXTS[number]) | model


def test_chains_and_parallel_branches_join_the_batch(model: Any, expected: list[str]) -> None:
    before = model.stats().steps
    chain = RunnableLambda(lambda number: TEXTS[number]) | model
    assert [text(answer) for answer in chain.batch(list(range(COUNT)))] == expected
    ran_together(model, before)
    branches = RunnableParallel({str(number): chain_of(number, model) for number in range(4)})
    before = model.stats().steps
    found = branches.invoke("go")
    assert [text(found[str(number)]) for number in range(4)] == expected[:4]
    ran_together(model, before)
    before = model.stats().steps
    generations = model.generate([[HumanMessage(one)] for one in TEXTS] if isinstance(model, ChatOctavo) else TEXTS)
    assert len(generations.generations) == len(generations.run) == COUNT
    assert [one[0].text for one in generations.generations] == expected
    ran_together(model, before)
    assert generations.llm_output["token_usage"]["completion_tokens"] == COUNT * TOKENS


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_largest_batch_is_all_of_them_or_as_many_as_asked_for(fresh: Any, asynchronous: bool) -> None:
    def run(config: RunnableConfig) -> list[Any]:
        return asyncio.run(fresh.abatch(TEXTS, config)) if asynchronous else fresh.batch(TEXTS, config)

    assert len(run({"max_concurrency": 4})) == COUNT
    assert fresh.stats().largest_batch == 4
    assert fresh.stats().steps < COUNT * TOKENS / 2
    assert len(run({})) == COUNT
    assert fresh.stats().largest_batch > COUNT / 2


# -- each input is its own run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_errors_stand_in_their_places(model: Any, asynchronous: bool) -> None:
    inputs = ["first", TOO_LONG, "third"]

    def run(**kwargs: Any) -> list[Any]:
        if asynchronous:
            return asyncio.run(model.abatch(inputs, **kwargs))  # type: ignore[no-any-return]
        return model.batch(inputs, **kwargs)  # type: ignore[no-any-return]

    first, error, third = run(return_exceptions=True)
    assert isinstance(error, RequestError)
    assert error.field == "prompt"
    assert text(first) == text(model.invoke("first"))
    assert text(third) == text(model.invoke("third"))
    with pytest.raises(RequestError, match="tokens"):
        run()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_errors_come_as_completed_too(model: Any, asynchronous: bool) -> None:
    inputs = ["first", TOO_LONG, "third"]

    async def ask(**kwargs: Any) -> dict[int, Any]:
        return {place: answer async for place, answer in model.abatch_as_completed(inputs, **kwargs)}

    def run(**kwargs: Any) -> dict[int, Any]:
        return asyncio.run(ask(**kwargs)) if asynchronous else dict(model.batch_as_completed(inputs, **kwargs))

    found = run(return_exceptions=True)
    assert sorted(found) == [0, 1, 2]
    assert [isinstance(found[place], RequestError) for place in range(3)] == [False, True, False]
    with pytest.raises(RequestError):
        run()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_callbacks_and_configs_are_each_inputs_own(model: Any, asynchronous: bool) -> None:
    recorders = [Recorder() for _ in range(3)]
    configs: list[RunnableConfig] = [
        {"callbacks": [recorder], "run_name": f"run {number}", "tags": [str(number)]}
        for number, recorder in enumerate(recorders)
    ]
    inputs = ["first", TOO_LONG, "third"]
    if asynchronous:
        asyncio.run(model.abatch(inputs, configs, return_exceptions=True))
    else:
        model.batch(inputs, configs, return_exceptions=True)
    tokens = 0 if isinstance(model, ChatOctavo) else TOKENS
    ended = {"start": 1, "end": 1} | ({"token": tokens} if tokens else {})
    assert [recorder.counts for recorder in recorders] == [ended, {"start": 1, "error": 1}, ended]
    assert recorders[1].errors == ["RequestError"]


def test_nothing_and_one(model: Any) -> None:
    assert model.batch([]) == asyncio.run(model.abatch([])) == list(model.batch_as_completed([])) == []
    assert len(model.batch(["one"])) == 1


# -- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_leaving_early_ends_the_others(model: Any, asynchronous: bool) -> None:
    inputs = [TOO_LONG, *TEXTS[:8]]
    options: dict[str, Any] = {"return_exceptions": True, "max_tokens": 480}

    async def leave() -> tuple[int, Any]:
        async for item in model.abatch_as_completed(inputs, **options):
            return item  # type: ignore[no-any-return]
        raise AssertionError

    before = model.stats().steps
    place, error = asyncio.run(leave()) if asynchronous else next(model.batch_as_completed(inputs, **options))
    assert place == 0
    assert isinstance(error, RequestError)
    deadline = time.monotonic() + 5
    while not at_rest(model.stats()) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert at_rest(model.stats())
    assert model.stats().steps - before < 200, "they ran to their ends"


def test_an_interrupt_ends_a_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while the main thread waits for the others."""
    from langchain_octavo import batching

    real = batching.wait

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        while model.stats().running < 4:
            time.sleep(0.001)
        monkeypatch.setattr(batching, "wait", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(batching, "wait", interrupted)
    before = model.stats().steps
    with pytest.raises(KeyboardInterrupt):
        model.batch(TEXTS[:8], max_tokens=480)
    assert model.stats().steps - before < 300
    assert at_rest(model.stats())
    assert text(model.invoke("still there"))
