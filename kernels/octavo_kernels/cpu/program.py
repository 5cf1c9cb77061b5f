"""A program is a list of kernels that all threads run one after the other, meeting at a barrier after each.

One call from Python runs a whole step of a model. On 2 cores, 270 empty kernels (30 layers) take 0.12 ms, waking the
second thread included; as many small additions by torch 0.33 (`benchmarks/cpu_program.py`). `Team` owns the threads.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from llvmlite import ir

from octavo_kernels.cpu.emit import KERNEL, Code, i32, i64, pointer

RUN = "run_program"
SPINS = 2000
"""Turns of waiting before a thread lets others run: some 50 us. Threads that have a core each never wait so long."""
_COUNT, _TURN = 0, 64  # bytes in the barrier: each on a cache line of its own

_Tasks = queue.SimpleQueue[tuple[int, int] | None]
"""Addresses of a program and of a step; None ends a member."""


def run_program(module: ir.Module) -> None:
    """`void run_program(program, step, thread, threads)`; program: barrier, number of kernels, then (kernel, args)."""
    code = Code(module, RUN)
    b = code.b
    barrier, count = code.pointer(0), code.arg(1)
    with code.loop(0, count) as number:
        entry = code.at(code.args, code.add(code.mul(number, 16), 16))
        kernel, args = code.load(entry, 0, KERNEL.as_pointer()), code.load(entry, 8, pointer)
        b.call(kernel, [args, code.step, code.thread, code.threads])
        _meet(code, barrier)
    code.finish()


def _meet(code: Code, barrier: object) -> None:
    b = code.b
    turn_at = code.at(barrier, _TURN)
    turn = b.load_atomic(turn_at, "acquire", 8, typ=i64)
    before = b.atomic_rmw("add", code.at(barrier, _COUNT), ir.Constant(i64, 1), "acq_rel")
    is_last = b.icmp_signed("==", before, code.sub(code.threads, 1))
    last, others, after = (code.function.append_basic_block(name) for name in ("last", "others", "after"))
    spin, rest, again = (code.function.append_basic_block(name) for name in ("spin", "rest", "again"))
    b.cbranch(is_last, last, others)
    b.position_at_end(last)
    b.atomic_rmw("xchg", code.at(barrier, _COUNT), ir.Constant(i64, 0), "monotonic")
    b.atomic_rmw("xchg", turn_at, code.add(turn, 1), "release")
    b.branch(after)
    b.position_at_end(others)
    b.branch(spin)
    b.position_at_end(spin)
    waited = b.phi(i64)
    waited.add_incoming(ir.Constant(i64, 0), others)
    code.call("llvm.x86.sse2.pause", ir.VoidType())
    b.cbranch(b.icmp_signed(">", waited, code.integer(SPINS)), rest, again)
    b.position_at_end(rest)
    code.call("sched_yield", i32)
    b.branch(again)
    b.position_at_end(again)
    waited.add_incoming(code.add(waited, 1), again)
    b.cbranch(b.icmp_signed("==", b.load_atomic(turn_at, "acquire", 8, typ=i64), turn), spin, after)
    b.position_at_end(after)


class Program:
    """Kernels with their arguments, as the tables that `run_program` reads. Keeps the tensors that it points to."""

    def __init__(self, kernels: Sequence[tuple[int, Sequence[int | torch.Tensor | None]]]) -> None:
        self._keep: list[object] = [args for _, args in kernels]
        tables = [torch.tensor([_value(arg) for arg in args] or [0], dtype=torch.int64) for _, args in kernels]
        self._barrier = torch.zeros(32, dtype=torch.int64)
        start = -self._barrier.data_ptr() % 64
        entries: list[int] = []
        for (kernel, _), table in zip(kernels, tables, strict=True):
            entries += (kernel, table.data_ptr())
        self._table = torch.tensor([self._barrier.data_ptr() + start, len(kernels), *entries], dtype=torch.int64)
        self._keep.append(tables)
        self.address = self._table.data_ptr()


def _value(arg: int | torch.Tensor | None) -> int:
    return arg.data_ptr() if isinstance(arg, torch.Tensor) else arg or 0


class Team:
    """The calling thread and `threads - 1` others, which sleep between programs. They end when the team is dropped."""

    def __init__(self, run: int, threads: int) -> None:
        self.threads = threads
        self._run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)(run)
        self._queues: list[_Tasks] = [queue.SimpleQueue() for _ in range(threads - 1)]
        members = []
        for number, tasks in enumerate(self._queues, start=1):
            args = (self._run, tasks, number, threads)
            members.append(threading.Thread(target=_member, args=args, name=f"octavo-cpu-{number}", daemon=True))
            members[-1].start()
        self.close = weakref.finalize(self, _dismiss, self._queues, members)

    def run(self, program: Program, step: torch.Tensor) -> None:
        """Run a program on all threads; returns when all are done. One program at a time."""
        address, values = program.address, step.data_ptr()
        for q in self._queues:
            q.put((address, values))
        self._run(address, values, 0, self.threads)


def _member(run: Callable[[int, int, int, int], None], tasks: _Tasks, number: int, threads: int) -> None:
    while (task := tasks.get()) is not None:
        run(*task, number, threads)


def _dismiss(queues: list[_Tasks], members: list[threading.Thread]) -> None:
    for q in queues:
        q.put(None)
    for member in members:
        if member is not threading.current_thread():
            member.join()
