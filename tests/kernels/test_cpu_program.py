"""Threads that run programs of CPU kernels, and the draw that needs none of them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from octavo_kernels.cpu.compiler import Library, available
from octavo_kernels.gumbel import gumbel_sample, gumbel_sample_reference

pytestmark = pytest.mark.skipif(not available(), reason="needs AVX512-VNNI, AVX512-BF16 and llvmlite")

if available():
    from llvmlite import ir
    from octavo_kernels.cpu import bandwidth
    from octavo_kernels.cpu.emit import Code, i64
    from octavo_kernels.cpu.program import Program, Team, functions


@pytest.fixture(scope="module")
def counting() -> Library:
    """`count`: every thread adds the step's value to a place of its own."""

    def make() -> ir.Module:
        module = ir.Module("test")
        functions(module)
        code = Code(module, "count")
        place = code.mul(code.thread, 64)
        code.store(code.add(code.load(code.pointer(0), place, i64), code.step_value(0)), code.pointer(0), place)
        code.finish()
        return module

    return Library(make, cache=None)


def members() -> int:
    return sum(thread.name.startswith("octavo-cpu-") for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_runs_every_kernel_once(counting: Library, threads: int) -> None:
    """Also with more threads than cores, when some sleep between programs, and called from several threads in turn."""
    before = members()
    team, sums = Team(counting, threads), torch.zeros(threads, 8, dtype=torch.int64)
    program = Program([(counting.address("count"), [sums])] * 7)

    def some(first: int) -> None:
        for number in range(first, first + 50):
            team.run(program, torch.tensor([number]))

    for first in (0, 50):
        caller = threading.Thread(target=some, args=(first,))
        caller.start()
        caller.join()
    for number in range(100, 110):
        time.sleep(0.01)  # members fall asleep
        team.run(program, torch.tensor([number]))
    assert sums[:, 0].tolist() == [7 * sum(range(110))] * threads
    assert members() == before + threads - 1
    team.close()
    assert members() == before


def test_a_dropped_team_ends_its_threads_and_keeps_the_code_until_then() -> None:
    def make() -> ir.Module:
        module = ir.Module("empty")
        functions(module)
        return module

    before = members()
    for _ in range(20):
        Team(Library(make, cache=None), 3)  # the library is dropped with it, while the members wait in its code
    assert members() == before


@pytest.mark.parametrize("vocabulary", [1, 5, 16, 100, 8193, 49152])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_draw_is_its_twin(vocabulary: int, rows: int) -> None:
    torch.manual_seed(vocabulary + rows)
    logits, temperature = torch.randn(rows, vocabulary + 3)[:, :vocabulary] * 4, torch.rand(rows) * 1.5
    temperature[::3] = 0
    logits[torch.rand(rows, vocabulary) < 0.1] = float("-inf")
    logits[:, vocabulary // 2] = 1.0
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.randint(0, 2**31, (rows,))
    found = gumbel_sample(logits, temperature, seeds, positions)
    assert torch.equal(found, gumbel_sample_reference(logits, temperature, seeds, positions))


def test_equal_logits_give_the_first_and_what_is_no_number_wins() -> None:
    logits = torch.zeros(4, 100)
    logits[0, [40, 41, 90]] = 3.0
    logits[1, 77] = float("nan")
    logits[2, 99] = float("nan")
    logits[3] = float("-inf")
    cold, keys = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    assert gumbel_sample(logits, cold, keys, keys).tolist() == [40, 77, 99, 0]
    assert gumbel_sample(logits[1:3].contiguous(), cold[1:3] + 1, keys[1:3], keys[1:3]).tolist() == [77, 99]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bandwidth_is_of_all_the_memory(threads: int) -> None:
    """Every kernel reads every value once."""
    memory, sums = torch.arange(3 * 2**18, dtype=torch.int32), torch.zeros(threads, 64, dtype=torch.int32)
    library = Library(bandwidth._module, cache=None)
    team = Team(library, threads)
    for streams in bandwidth.STREAMS:
        pieces = memory.nbytes // (256 * streams * threads)
        read = Program([(library.address(f"read_{streams}"), (memory, pieces, sums))])
        team.run(read, torch.zeros(1, dtype=torch.int64))
        whole = memory[: pieces * 64 * streams * threads].sum(dtype=torch.int32)
        assert sums.sum(dtype=torch.int32) == whole
    team.close()
    assert bandwidth.read_bandwidth(memory, threads) > 1e8
