"""The engine's thread and its callers: a bounded queue, the end in the middle of work, forked children, threads."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from octavo import LLM, AsyncLLM, SamplingParams
from octavo.engine.core import EngineCore
from octavo.engine.service import EngineService
from octavo.errors import EngineClosedError, QueueFullError

LONG = SamplingParams(temperature=0.0, max_tokens=480, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[LLM]:
    """One row, and room for three requests that wait."""
    settings: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 1, "max_queued_requests": 3}
    with LLM(str(tiny_model), **settings) as llm:
        yield llm


@contextmanager
def held(llm: LLM) -> Iterator[None]:
    """The engine's thread stands still between two steps, as during a long step."""
    entered, leave = threading.Event(), threading.Event()

    def hold(core: EngineCore) -> None:
        entered.set()
        assert leave.wait(60)

    caller = threading.Thread(target=llm.engine.service.call, args=[hold])
    caller.start()
    assert entered.wait(60)
    try:
        yield
    finally:
        leave.set()
        caller.join()


def until(condition: Callable[[], bool]) -> None:
    """For what no event tells: how far another thread has come."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -- the bounded queue -----------------------------------------------------------------------------------------------


def test_one_more_than_the_queue_holds_is_refused(llm: LLM) -> None:
    with held(llm):
        streams = [llm.stream([5 + i], SHORT) for i in range(3)]
        for _ in range(2):
            with pytest.raises(QueueFullError, match="3 requests wait") as caught:
                llm.stream([9], SHORT)
    assert isinstance(caught.value, RuntimeError)
    assert "max_queued_requests" in str(caught.value)
    assert [len(stream.output.outputs[0].token_ids) for stream in streams if list(stream)] == [8, 8, 8]
    assert len(list(llm.stream([9], SHORT))) > 0, "the queue is still full"


def test_a_running_request_takes_no_place_in_the_queue(llm: LLM) -> None:
    running = llm.stream([5], LONG)
    next(running)
    with held(llm):
        waiting = [llm.stream([6 + i], SHORT) for i in range(3)]
        with pytest.raises(QueueFullError):
            llm.stream([9], SHORT)
        waiting[0].close()  # an abort makes room, as soon as the engine hears of it
    llm.stats()
    with held(llm):
        another = llm.stream([9], SHORT)
    running.close()
    for stream in [*waiting[1:], another]:
        list(stream)
        assert len(stream.output.outputs[0].token_ids) == 8


def test_a_batch_larger_than_the_queue_waits_for_room(llm: LLM) -> None:
    prompts = [[5 + i % 50, 7] for i in range(40)]
    outputs = llm.generate(prompts, SHORT)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)


async def test_an_async_batch_larger_than_the_queue_waits_for_room(tiny_model: Path) -> None:
    async with AsyncLLM(str(tiny_model), dtype="float32", max_num_seqs=1, max_queued_requests=3) as llm:
        prompts = [[5 + i % 50, 7] for i in range(40)]
        outputs = await llm.generate(prompts, SHORT)
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
        assert llm.stats().blocks_used == 0


def test_who_waits_for_room_hears_of_the_end(llm: LLM) -> None:
    """40 requests of one thread, of which 3 fit: `close` must wake the thread, not leave it there."""
    started = threading.Event()
    errors: queue.Queue[BaseException] = queue.Queue()

    def caller() -> None:
        started.set()
        try:
            llm.generate([[5, i] for i in range(40)], LONG)
        except BaseException as error:
            errors.put(error)

    thread = threading.Thread(target=caller)
    with held(llm):
        thread.start()
        started.wait()
        until(lambda: llm.engine.service._backlog() == 3)
    llm.close()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(errors.get_nowait(), EngineClosedError)


# -- the end ---------------------------------------------------------------------------------------------------------


def test_closing_ends_what_runs_and_what_waits(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), dtype="float32", max_num_seqs=2)
    service = llm.engine.service
    streams = [llm.stream([5 + i, 6], LONG) for i in range(6)]
    pieces = [next(streams[0]), next(streams[1])]
    assert all(pieces)
    llm.close()
    assert service.closed
    assert not service._thread.is_alive()
    for stream in streams:
        with pytest.raises(EngineClosedError, match="closed before this request ended"):
            list(stream)
        stream.close()
    assert streams[0].output.outputs[0].token_ids, "what had been made is lost"
    assert not streams[0].output.finished
    llm.close()
    service.close()
    for use in (service.stats, lambda: service.submit(streams[0]._assembler.request)):
        with pytest.raises(EngineClosedError, match="make a new LLM"):
            use()
    service.abort(streams[0]._assembler.request)


def test_closing_does_not_wait_for_the_requests(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), dtype="float32", num_blocks=65)
    streams = [llm.stream([5 + i, 6], LONG) for i in range(4)]
    next(streams[0])
    steps = llm.stats().steps
    core: list[EngineCore] = []
    llm.engine.service.call(core.append)
    llm.close()
    assert core[0].steps < steps + 100, "480 tokens were made before the engine closed"


def test_many_threads_close_at_once(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), dtype="float32")
    stream = llm.stream([5], LONG)
    gate = threading.Barrier(8)

    def close(_: int) -> None:
        gate.wait()
        llm.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(close, range(8)))
    with pytest.raises(EngineClosedError):
        list(stream)
    with LLM(str(tiny_model), dtype="float32") as other:
        assert other.generate([5], SHORT)


def test_each_share_is_given_back_once(tiny_model: Path) -> None:
    """Two LLMs on one engine, closed by 8 threads: the second must keep its engine."""
    first, second = (LLM(str(tiny_model), dtype="float32") for _ in range(2))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: first.close(), range(8)))
    assert len(second.generate([5], SHORT)[0].outputs[0].token_ids) == 8
    second.close()


def test_a_start_that_fails_tells_why_and_ends_the_thread() -> None:
    def fail() -> EngineCore:
        raise MemoryError("no room")

    service = EngineService(fail, max_queued_requests=1)
    with pytest.raises(MemoryError, match="no room"):
        service.start()
    assert not service._thread.is_alive()
    with pytest.raises(EngineClosedError, match="no room"):
        service.stats()
    service.close()


def test_an_error_in_a_call_reaches_its_caller_only(llm: LLM) -> None:
    stream = llm.stream([5], LONG)
    with pytest.raises(ZeroDivisionError):
        llm.engine.service.call(lambda core: 1 // 0)
    list(stream)
    assert stream.output.finished


def test_the_program_ends_although_a_request_runs(tiny_model: Path) -> None:
    """Neither `close` nor a join is needed: the interpreter ends with 0, without a word, and soon."""
    code = f"""
from octavo import LLM, SamplingParams
llm = LLM({str(tiny_model)!r}, dtype="float32")
stream = llm.stream([5, 6], SamplingParams(max_tokens=500, ignore_eos=True, n=8))
next(stream)
print("leaving", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


# -- threads ---------------------------------------------------------------------------------------------------------


def test_callers_in_many_threads_share_the_batches(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32", max_num_seqs=32) as llm:
        prompts = [[5 + i, 7, 9] for i in range(32)]
        params = SamplingParams(temperature=1.0, seed=4, max_tokens=40, ignore_eos=True)
        alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
        before = llm.stats().steps
        outputs: dict[int, list[int]] = {}

        def caller(number: int) -> None:
            outputs[number] = llm.generate(prompts[number], params)[0].outputs[0].token_ids

        threads = [threading.Thread(target=caller, args=[number]) for number in range(32)]
        with held(llm):
            for thread in threads:
                thread.start()
            until(lambda: llm.engine.service._backlog() == 32)
        for thread in threads:
            thread.join()
        assert [outputs[number] for number in range(32)] == alone
        assert llm.stats().steps - before < 3 * 40, "the callers did not share their steps"


# -- forked children -------------------------------------------------------------------------------------------------

FORKED = """
import os, signal, sys, threading
from octavo import LLM, AsyncLLM, SamplingParams
from octavo.engine import registry

model = sys.argv[1]
llm = LLM(model, dtype="float32")
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
prompt = "The quick brown fox"
expected = llm.generate(prompt, params)[0].outputs[0].token_ids
stream = llm.stream(prompt, SamplingParams(max_tokens=400, ignore_eos=True))
next(stream)
gate, leave = threading.Event(), threading.Event()

def holder():  # another thread is in the middle of `acquire` when this one forks
    with registry._lock:
        gate.set()
        leave.wait()

threading.Thread(target=holder).start()
gate.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that hangs ends with a signal
    refused = []
    for use in (lambda: llm.generate(prompt), lambda: llm.stream(prompt), lambda: next(stream), lambda: llm.stats(),
                lambda: llm.chat([{"role": "user", "content": "x"}])):
        try:
            use()
        except Exception as error:
            refused.append(type(error).__name__ + " " + str("spawn" in str(error)))
    print(sorted(set(refused)), len(refused))
    stream.close()
    llm.close()
    with LLM(model, dtype="float32") as own:
        print(own.generate(prompt, params)[0].outputs[0].token_ids == expected)
    sys.stdout.flush()
    sys.exit(7)  # through atexit, as a child of multiprocessing does not, but a shell-like fork does
leave.set()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
list(stream)
print(len(stream.output.outputs[0].token_ids), llm.generate(prompt, params)[0].outputs[0].token_ids == expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_forked_child_is_refused_and_may_have_an_engine_of_its_own(tiny_model: Path, threads: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, str(tiny_model)], capture_output=True,
        text=True, timeout=200, check=False, env=os.environ | {"OMP_NUM_THREADS": threads},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['ForkedEngineError True'] 5", "True", "7", "400 True"]
    assert done.stderr == ""
