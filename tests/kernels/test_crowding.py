"""Programs of CPU kernels where their threads do not get the cores that they want. Needs no AVX512."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from octavo_kernels.cpu.compiler import Library

able = sys.platform == "linux" and platform.machine() == "x86_64" and find_spec("llvmlite") is not None
pytestmark = pytest.mark.skipif(not able, reason="needs Linux on x86-64 and llvmlite")

if able:
    from llvmlite import ir
    from octavo_kernels.cpu import crowding
    from octavo_kernels.cpu.emit import Code, i32, i64
    from octavo_kernels.cpu.program import Program, Team, functions

NUMBERS = 1000


@pytest.fixture(scope="module")
def library() -> Library:
    """`add`: the step's first value to each of `NUMBERS` numbers, a share a thread. `doze`: of its threads, the one
    that the step's second value names sleeps for the third's microseconds. `toil`: it is at work, for a
    tenth as long or more. `come`: each thread counts. `nothing`."""

    def make() -> ir.Module:
        module = ir.Module("crowding")
        functions(module)
        code = Code(module, "add")
        first, last = code.share(code.integer(NUMBERS))
        with code.loop(first, last) as at:
            place = code.mul(at, 8)
            code.store(code.add(code.load(code.pointer(0), place, i64), code.step_value(0)), code.pointer(0), place)
        code.finish()
        code = Code(module, "doze")
        with code.b.if_then(code.b.icmp_signed("==", code.thread, code.step_value(1))):
            code.call("usleep", i32, code.b.trunc(code.step_value(2), i32))
        code.finish()
        code = Code(module, "toil")
        mine = code.b.icmp_signed("==", code.thread, code.step_value(1))
        with code.b.if_then(mine), code.loop(0, code.mul(code.step_value(2), 40)):
            code.pause()
        code.finish()
        code = Code(module, "come")
        place = code.mul(code.thread, 8)
        code.store(code.add(code.load(code.pointer(0), place, i64), 1), code.pointer(0), place)
        code.finish()
        Code(module, "nothing").finish()
        return module

    return Library(make, cache=None)


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Other processes want each core that this process may use, and one more."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)) + 1)
    ]
    yield
    for other in others:
        other.kill()
        other.wait()


class Adding:
    """A team that adds in 12 kernels, with a doze after each; `run` checks that every number was reached once."""

    def __init__(self, library: Library, threads: int) -> None:
        self.team = Team(library, threads, yields=True)
        self._sums = torch.zeros(12, NUMBERS, dtype=torch.int64)
        add, doze = library.address("add"), library.address("doze")
        self.came = torch.zeros(threads, dtype=torch.int64)
        kernels = [kernel for row in self._sums for kernel in ((add, [row]), (doze, []))]
        self._program = Program([(library.address("come"), [self.came]), *kernels])
        self._whole = 0

    def run(self, *, slow: int = -1, milliseconds: float = 0.0) -> int:
        """Threads after it."""
        value = 1 + self._whole % 7
        self.team.run(self._program, torch.tensor([value, slow, int(1000 * milliseconds)]))
        self._whole += value
        assert (self._sums == self._whole).all()
        return self.team.running


def run_until(adding: Adding, threads: int, *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while adding.run() != threads:
        assert time.monotonic() < end, f"still {adding.team.running} threads"


@pytest.mark.parametrize("slow", [0, 1])
def test_of_two_threads_one_is_left_out_and_comes_back(library: Library, slow: int) -> None:
    """Whichever is slow, the caller's own stays."""
    adding = Adding(library, 2)
    run_until(adding, 2)
    began = time.perf_counter()
    assert adding.run(slow=slow, milliseconds=15) == 1, "not within one program"
    if slow == 1:
        assert time.perf_counter() - began < 12 * 0.015, "the thread was left out at the program's end only"
    time.sleep(crowding.SOON / 1e9)
    run_until(adding, 2)
    adding.team.close()


def test_what_is_asked_in_vain_is_asked_less_often(library: Library) -> None:
    adding = Adding(library, 2)
    adding.run(slow=1, milliseconds=15)
    before, programs, end = int(adding.came[1]), 0, time.monotonic() + 3.5
    while time.monotonic() < end:
        adding.run(slow=1, milliseconds=15)
        programs += 1
    asked = int(adding.came[1]) - before
    assert 2 <= asked <= 5, f"{asked} of {programs} times"  # after 0.25, 0.5, 1 and 2 s
    adding.team.close()


@pytest.mark.parametrize("threads", [3, 5])
def test_threads_come_and_go_in_every_order(library: Library, threads: int) -> None:
    """Some still sleep in one program when others run the next."""
    adding, seen = Adding(library, threads), set[int]()
    for number in range(400):
        seen.add(adding.run(slow=number // 3 % threads, milliseconds=4 if number % 3 == 0 else 0))
        if number % 40 == 39:
            time.sleep(crowding.SOON / 1e9)
    assert len(seen) >= 2, "never fewer threads: nothing was shown"
    adding.team.close()
    assert not any(thread.name.startswith("octavo-cpu-") for thread in threading.enumerate())


def test_a_team_that_does_not_yield_keeps_its_threads(library: Library) -> None:
    team, step = Team(library, 2), torch.tensor([0, 1, 15000])
    program = Program([(library.address("doze"), [])] * 6)
    began = time.perf_counter()
    team.run(program, step)
    assert time.perf_counter() - began > 6 * 0.015
    assert team.running == 2
    team.close()


def test_a_thread_that_has_more_to_do_than_others_stays(library: Library) -> None:
    """The other one waits for it for all of the time; at one of some moments it has its core all that time."""
    step, stayed = torch.tensor([0, 1, 8000]), 0  # a pause takes 5 to 60 ns, by the processor
    program = Program([(library.address("toil"), [])] * 20)
    end = time.monotonic() + 60
    while not stayed and time.monotonic() < end:
        team = Team(library, 2, yields=True)
        began = time.perf_counter()
        team.run(program, step)
        assert time.perf_counter() - began > 2 * crowding.barrier.LEAST_LOST / 1e9, "too short to show anything"
        stayed += team.running == 2
        team.close()
    assert stayed


@pytest.mark.usefixtures("busy_cores")
def test_more_threads_than_cores_make_progress_beside_busy_processes(library: Library) -> None:
    """270 kernels a program."""
    team, step = Team(library, 8, yields=True), torch.zeros(1, dtype=torch.int64)
    program = Program([(library.address("nothing"), [])] * 270)
    began = time.perf_counter()
    for _ in range(20):
        team.run(program, step)
    assert time.perf_counter() - began < 10
    team.close()
