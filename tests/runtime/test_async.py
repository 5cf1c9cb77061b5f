"""`AsyncLLM`: the outputs of `LLM`, many at once in one loop, and requests that end with the task that asked."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from octavo import LLM, AsyncLLM, SamplingParams
from octavo.errors import ConfigError, EngineClosedError, QueueFullError, RequestError, RequestFailedError

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": "Hello"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=480, ignore_eos=True)
IMPOSSIBLE = SamplingParams(allowed_token_ids=[1], min_tokens=2, max_tokens=4)


@pytest_asyncio.fixture
async def llm(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(str(tiny_model), dtype="float32", max_num_seqs=8, max_queued_requests=200) as llm:
        yield llm
        nothing_is_left(llm)
    gc.collect()
    complaints = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert not complaints, "asyncio says something was forgotten"


def nothing_is_left(llm: AsyncLLM | LLM) -> None:
    """`stats` is answered after everything that the engine was told before."""
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert not llm.engine.service._open


@asynccontextmanager
async def ticking() -> AsyncIterator[list[int]]:
    """Counts how often the event loop comes round."""
    ticks = [0]

    async def tick() -> None:
        while True:
            ticks[0] += 1
            await asyncio.sleep(0.001)

    task = asyncio.create_task(tick())
    await asyncio.sleep(0)
    yield ticks
    task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


# -- the same outputs ------------------------------------------------------------------------------------------------


async def test_it_gives_what_llm_gives(llm: AsyncLLM, tiny_model: Path) -> None:
    params = SamplingParams(seed=3, n=2, max_tokens=20, logprobs=2, temperature=1.2)
    with LLM(str(tiny_model), dtype="float32", num_blocks=65) as other:
        expected = other.generate([PROMPT, [5, 6, 7]], params)
        answer = other.chat(MESSAGES, params)
        conversations = other.chat([MESSAGES, MESSAGES * 2], GREEDY)
    outputs = await llm.generate([PROMPT, [5, 6, 7]], params)
    assert [output.outputs for output in outputs] == [output.outputs for output in expected]
    assert [output.prompt for output in outputs] == [PROMPT, None]
    assert (await llm.chat(MESSAGES, params))[0].outputs == answer[0].outputs
    both = await llm.chat([MESSAGES, MESSAGES * 2], GREEDY)
    assert [output.outputs for output in both] == [output.outputs for output in conversations]
    pieces = [piece async for piece in llm.stream(PROMPT, params)]
    for choice in expected[0].outputs:
        assert "".join(piece.text for piece in pieces if piece.index == choice.index) == choice.text
    assert pieces[-1].output is not None
    assert pieces[-1].output.outputs == expected[0].outputs
    chat_pieces = [piece async for piece in llm.chat_stream(MESSAGES, GREEDY)]
    assert "".join(piece.text for piece in chat_pieces) == conversations[0].outputs[0].text
    (bare,) = await llm.chat(MESSAGES, GREEDY, add_generation_prompt=False, chat_template_kwargs={"tone": "kind"})
    assert bare.prompt == "user: Hello\n"
    assert await llm.generate([]) == []


async def test_many_at_once_share_the_engine_and_leave_the_loop_free(llm: AsyncLLM) -> None:
    prompts = [[5 + i, 9] for i in range(100)]
    params = [SamplingParams(seed=i, max_tokens=1 + i % 30, ignore_eos=True) for i in range(100)]
    alone = [(await llm.generate(p, q))[0].outputs[0].token_ids for p, q in zip(prompts[:10], params, strict=False)]
    before = llm.stats().steps
    async with ticking() as ticks:
        outputs = await asyncio.gather(*(llm.generate(p, q) for p, q in zip(prompts, params, strict=True)))
    found = [output[0].outputs[0].token_ids for output in outputs]
    assert [len(tokens) for tokens in found] == [1 + i % 30 for i in range(100)]
    assert found[:10] == alone
    assert llm.stats().steps - before < sum(map(len, found)) / 4, "they ran one after the other"
    assert ticks[0] > 20, "the event loop was blocked"


async def test_streams_of_many_tasks_are_interleaved(llm: AsyncLLM) -> None:
    order: list[int] = []

    async def read(number: int) -> str:
        text = ""
        async for piece in llm.stream([5 + number, 7], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)):
            order.append(number)
            text += piece.text
        return text

    texts = await asyncio.gather(*(read(number) for number in range(6)))
    assert len(set(texts)) == 6
    switches = sum(one != other for one, other in pairwise(order))
    assert switches > 60, "each stream came in one go"


async def test_create_leaves_the_loop_free(tiny_model: Path) -> None:
    async with ticking() as ticks:
        llm = await AsyncLLM.create(str(tiny_model), dtype="float32", num_blocks=33)
    assert ticks[0] >= 3, "the event loop stood still while the model was loaded"
    async with llm:
        assert len((await llm.generate(PROMPT, GREEDY))[0].outputs[0].token_ids) == 12
        assert llm.stats().blocks_total == 32
    with pytest.raises(ConfigError):
        await AsyncLLM.create(str(tiny_model), quantization="awq")


# -- leaving early ---------------------------------------------------------------------------------------------------


async def test_a_cancelled_task_ends_its_requests(llm: AsyncLLM) -> None:
    task = asyncio.create_task(llm.generate([[5, 6], [7, 8], [9]], LONG))
    await until(lambda: llm.stats().running == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    nothing_is_left(llm)


async def test_a_task_cancelled_before_it_began_asks_for_nothing(llm: AsyncLLM) -> None:
    steps = llm.stats().steps
    task = asyncio.create_task(llm.generate(PROMPT, LONG))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    nothing_is_left(llm)
    assert llm.stats().steps == steps


async def _by_break(llm: AsyncLLM) -> None:
    async for _ in llm.stream(PROMPT, LONG):
        break


async def _by_close(llm: AsyncLLM) -> None:
    stream = llm.stream(PROMPT, LONG)
    await anext(stream)
    await stream.aclose()
    await stream.aclose()


async def _by_context(llm: AsyncLLM) -> None:
    async def fail() -> None:
        async with llm.stream(PROMPT, LONG) as stream:
            await anext(stream)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()


async def _by_timeout(llm: AsyncLLM) -> None:
    async def read() -> None:
        async for _ in llm.stream(PROMPT, LONG):
            seen.set()

    seen = asyncio.Event()
    task = asyncio.create_task(read())
    await seen.wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(task, 0)


async def _by_a_failing_neighbour(llm: AsyncLLM) -> None:
    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(llm.generate(PROMPT, LONG))
            group.create_task(llm.generate(PROMPT, IMPOSSIBLE))

    with pytest.raises(ExceptionGroup) as caught:
        await both()
    assert isinstance(caught.value.exceptions[0], RequestFailedError)


@pytest.mark.parametrize("leave", [_by_break, _by_close, _by_context, _by_timeout, _by_a_failing_neighbour])
async def test_leaving_early_ends_the_request(llm: AsyncLLM, leave: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    await leave(llm)
    gc.collect()
    nothing_is_left(llm)
    made = llm.engine.service.call(lambda core: core.steps)
    assert made < 400, "the request ran to its end"


async def test_a_batch_cancelled_while_it_waits_for_room_does_not_come_back(tiny_model: Path) -> None:
    async with AsyncLLM(str(tiny_model), dtype="float32", max_num_seqs=1, max_queued_requests=2) as llm:
        task = asyncio.create_task(llm.generate([[5, i] for i in range(2, 20)], LONG))
        service = llm.engine.service
        await until(lambda: llm.stats().running == service._backlog() - 1 == len(service._room_callbacks) == 1)
        with pytest.raises(QueueFullError):
            llm.stream(PROMPT, GREEDY)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        nothing_is_left(llm)
        assert len((await llm.generate(PROMPT, GREEDY))[0].outputs[0].token_ids) == 12
        nothing_is_left(llm)


def test_an_event_loop_that_ends_takes_its_requests_along(tiny_model: Path) -> None:
    """A stream that is still open when its loop is closed cannot be told anything any more."""
    with LLM(str(tiny_model), dtype="float32", max_num_seqs=8) as other:
        kept: list[Any] = []

        async def main() -> None:
            llm = AsyncLLM(str(tiny_model), dtype="float32", max_num_seqs=8)
            assert llm.engine is other.engine
            kept.extend([llm, llm.stream(PROMPT, LONG), llm.stream([5, 6], LONG)])
            await anext(kept[1])

        asyncio.run(main())
        for _ in range(2000):  # the next token that is sent finds out
            if not other.stats().running:
                break
        nothing_is_left(other)
        assert other.engine.service.call(lambda core: core.steps) < 400
        assert len(other.generate(PROMPT, GREEDY)[0].outputs[0].token_ids) == 12
        kept[0].close()


# -- errors and the end ----------------------------------------------------------------------------------------------


async def test_errors_are_those_of_llm(llm: AsyncLLM) -> None:
    with pytest.raises(RequestError) as caught:
        await llm.generate(["a", ""])
    assert caught.value.field == "prompt"
    with pytest.raises(RequestError) as caught:
        llm.stream(PROMPT, SamplingParams(best_of=2))
    assert caught.value.field == "best_of"
    with pytest.raises(RequestError) as caught:
        await llm.chat([])
    assert caught.value.field == "messages"
    good, bad = await llm.generate([PROMPT, PROMPT], [GREEDY, IMPOSSIBLE], return_exceptions=True)
    assert isinstance(bad, RequestFailedError)
    with pytest.raises(RequestFailedError) as failed:
        await llm.generate([PROMPT, PROMPT], [GREEDY, IMPOSSIBLE])
    assert failed.value.outputs[0].outputs == good.outputs  # type: ignore[attr-defined]


async def test_closing_ends_what_runs(tiny_model: Path) -> None:
    llm = AsyncLLM(str(tiny_model), dtype="float32", max_num_seqs=2)
    stream = llm.stream(PROMPT, LONG)
    task = asyncio.create_task(llm.generate([[5, i] for i in range(2, 9)], LONG))
    await anext(stream)
    await llm.aclose()
    with pytest.raises(EngineClosedError, match="closed"):
        async for _ in stream:
            pass
    with pytest.raises(EngineClosedError, match="closed"):
        await task
    await llm.aclose()
    llm.close()
    for use in (llm.generate, llm.chat):
        with pytest.raises(EngineClosedError, match="make a new"):
            await use(MESSAGES if use == llm.chat else PROMPT)
    with pytest.raises(EngineClosedError):
        llm.stream(PROMPT)


# -- sync in async, and several loops --------------------------------------------------------------------------------


async def test_llm_works_inside_a_running_loop(llm: AsyncLLM, tiny_model: Path) -> None:
    """As in a cell of a notebook, where a loop always runs."""
    with LLM(str(tiny_model), dtype="float32", max_num_seqs=8, max_queued_requests=200) as sync:
        assert sync.engine is llm.engine
        (output,) = sync.generate(PROMPT, GREEDY)
        assert "".join(piece.text for piece in sync.stream(PROMPT, GREEDY)) == output.outputs[0].text
        assert (await llm.generate(PROMPT, GREEDY))[0].outputs == output.outputs
        assert sync.chat(MESSAGES, GREEDY)[0].outputs == (await llm.chat(MESSAGES, GREEDY))[0].outputs


async def test_loops_of_several_threads_share_the_engine(llm: AsyncLLM) -> None:
    (expected,) = await llm.generate(PROMPT, GREEDY)
    found: list[Any] = []

    def loop_of_its_own() -> None:
        async def main() -> None:
            found.extend(await asyncio.gather(*(llm.generate(PROMPT, GREEDY) for _ in range(5))))

        asyncio.run(main())

    threads = [threading.Thread(target=loop_of_its_own) for _ in range(4)]
    for thread in threads:
        thread.start()
    mine = await llm.generate([PROMPT] * 5, GREEDY)
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    assert len(found) == 20
    assert all(output.outputs == expected.outputs for output in [*mine, *(found[0] for found in found)])
