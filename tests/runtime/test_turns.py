"""Engines of one process that share its cores: in order, never too many at once, and nobody keeps what it took."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo import LLM, SamplingParams
from octavo.engine.core import EngineCore
from octavo.engine.service import EngineService
from octavo.engine.turns import PROCESS_CORES, Cores, Turn
from octavo_kernels.cpu.compiler import available
from tiny_models import Parts

LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_threads(*functions: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[function]) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@given(st.integers(1, 8), st.lists(st.integers(1, 8), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_those_who_wait_come_in_order_and_never_have_more_than_there_is(count: int, wishes: list[int]) -> None:
    cores, started = Cores(count), []
    turns = [Turn(cores, wish) for wish in wishes]
    in_use, most, guard = 0, 0, threading.Lock()

    def step(number: int) -> None:
        nonlocal in_use, most
        with turns[number]:
            with guard:
                started.append(number)
                in_use += turns[number]._count
                most = max(most, in_use)
            if number % 2:
                time.sleep(0.0005)
            with guard:
                in_use -= turns[number]._count

    threads = []
    cores.take(count)
    for number in range(len(wishes)):
        threads.append(threading.Thread(target=step, args=[number]))
        threads[-1].start()
        until(lambda expected=number + 1: len(cores._waiting) == expected)  # type: ignore[misc]
    cores.give(count)
    for thread in threads:
        thread.join()
    assert most <= count
    if all(2 * min(wish, count) > count for wish in wishes):
        assert started == sorted(started)
    assert (cores._free, len(cores._waiting)) == (count, 0)


def test_small_engines_run_at_the_same_time() -> None:
    cores, both = Cores(2), threading.Barrier(2, timeout=60)

    def step() -> None:
        with Turn(cores, 1):
            both.wait()

    in_threads(step, step)


def test_a_large_wish_is_not_passed_by_small_ones() -> None:
    cores = Cores(2)
    cores.take(1)
    large = threading.Thread(target=cores.take, args=[2])
    large.start()
    until(lambda: len(cores._waiting) == 1)
    small = threading.Thread(target=cores.take, args=[1])
    small.start()
    until(lambda: len(cores._waiting) == 2)
    cores.give(1)
    large.join()
    assert small.is_alive()
    cores.give(2)
    small.join()


def test_a_wish_for_more_than_there_is_gets_all() -> None:
    cores = Cores(2)
    with Turn(cores, 64):
        assert cores._free == 0
    assert cores._free == 2


class _Interrupted:
    """A lock of one who waits and is interrupted: before it is handed over, or just after."""

    def __init__(self, after: Callable[[], None]) -> None:
        self._after, self._calls = after, 0

    def acquire(self) -> None:
        self._calls += 1
        if self._calls == 2:
            self._after()
            raise KeyboardInterrupt

    def release(self) -> None:
        pass


@pytest.mark.parametrize("handed_over", [False, True])
def test_an_interrupt_while_waiting_loses_nothing(handed_over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = Cores(2)
    cores.take(2)
    gate = _Interrupted(lambda: cores.give(2) if handed_over else None)
    monkeypatch.setattr(threading, "Lock", lambda: gate)
    with pytest.raises(KeyboardInterrupt):
        cores.take(1)
    if not handed_over:
        cores.give(2)
    assert (cores._free, len(cores._waiting)) == (2, 0)


FORK = """
import os, sys
from octavo.engine.turns import PROCESS_CORES, Turn
PROCESS_CORES.take(PROCESS_CORES.count)
child = os.fork()
if child == 0:
    with Turn(PROCESS_CORES, 1):
        os._exit(7)
sys.exit(0 if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7 else 1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_waits_for_no_engine_of_its_parent() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


# -- real engines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    return Parts(tiny_model, torch.float32)


def core_in_turns(parts: Parts, cores: Cores, **more: Any) -> EngineCore:
    core = parts.core(**more)
    core._turns = Turn(cores, cores.count)
    return core


def test_two_engines_come_equally_far(parts: Parts) -> None:
    """When the first has done its work, the other has done most of its own."""
    cores = Cores(2)
    drivers = [Driver(core_in_turns(parts, cores)) for _ in range(2)]
    other_came: list[int] = []
    ready = threading.Barrier(2, timeout=60)

    def run(mine: Driver, other: Driver) -> None:
        ready.wait()
        mine.generate([[5, 6, 7], [8, 9]], LONG)
        other_came.append(other.core.steps)

    in_threads(lambda: run(drivers[0], drivers[1]), lambda: run(drivers[1], drivers[0]))
    assert [driver.core.steps for driver in drivers] == [200, 200]
    assert min(other_came) > 100
    assert cores._free == 2


class _Failing:
    def forward(self, context: object) -> torch.Tensor:
        raise RuntimeError("out of order")


def test_a_failing_engine_keeps_no_cores(parts: Parts) -> None:
    cores = Cores(2)
    good, bad = Driver(core_in_turns(parts, cores)), Driver(core_in_turns(parts, cores, model=_Failing()))
    bad.add([5, 6, 7], LONG)
    in_threads(bad.run, lambda: good.generate([[5, 6, 7]], LONG) and None)
    assert len(bad.errors) == 1
    assert cores._free == 2


def test_an_engine_that_waits_can_be_closed(parts: Parts) -> None:
    cores = Cores(2)
    service = EngineService(lambda: core_in_turns(parts, cores), max_queued_requests=4)
    service.start()
    cores.take(2)
    driver = Driver(service._core)  # type: ignore[arg-type]
    request = driver.add([5, 6, 7], LONG)
    service.abort(request)  # any command wakes it: it has work, and waits for its turn
    until(lambda: len(cores._waiting) == 1)
    closing = threading.Thread(target=service.close)
    closing.start()
    until(lambda: service.closed)
    cores.give(2)
    closing.join(60)
    assert not closing.is_alive()
    assert cores._free == 2


def turns_of(llm: LLM) -> object:
    return llm.engine.service.call(lambda core: core._turns)


def test_only_packed_engines_take_turns(default_model: Path) -> None:
    """The others leave cores idle between their operators: two at once are faster than one after the other."""
    with LLM(str(default_model)) as llm:
        assert not isinstance(turns_of(llm), Turn) or llm.engine.limits.packed
    if available():
        with LLM(str(default_model), quantization="gguf") as llm:
            turn = turns_of(llm)
            assert isinstance(turn, Turn)
            assert turn._cores is PROCESS_CORES
