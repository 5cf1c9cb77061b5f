"""A program is a list of kernels that all threads run one after the other, meeting at a barrier after each.

One call from Python runs a whole step of a model. `Team` owns the threads. Its members run no Python: they wait at a
mailbox in memory, for a moment awake and then asleep (a futex), so a program never waits for the interpreter's lock.
On 2 cores, 270 empty kernels (30 layers) take 0.03 to 0.08 ms, by where the system puts the threads, as many small
additions by torch 0.33 (`benchmarks/cpu_program.py`). Where other processes want the same cores, threads sleep at the
barrier (`barrier.py`), and a team goes on with fewer (`crowding.py`): `benchmarks/crowded.py` says what that is worth.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from llvmlite import ir

from octavo_kernels.cpu import barrier
from octavo_kernels.cpu.compiler import Library
from octavo_kernels.cpu.crowding import Crowding
from octavo_kernels.cpu.emit import KERNEL, Code, i32, i64, pointer

RUN, LEAD, FOLLOW = "run_program", "lead", "follow"
AWAKE = 40000
"""Turns of waiting for a program before a thread sleeps: 1 ms, more than passes between two steps of one request. Being
woken from sleep each time cost that request 4 % of its tokens."""
_POSTS, _SLEEPERS, _PROGRAM, _STEP = 0, barrier.APART, 2 * barrier.APART, 2 * barrier.APART + 8
"""Bytes in a team's memory, before those of the barrier. The posts are a word as in `barrier`: how many there were, and
how many threads the last one is for."""
_MEMORY = 6 * barrier.APART
_EVERY = 2**31 - 1
_BITS = 32  # of the set of members that a futex wakes: the last is of all who have none of their own


def functions(module: ir.Module) -> None:
    """What a module needs beside its kernels, to be run by a `Team`."""
    _run_program(module)
    _lead(module)
    _follow(module)


def _run_program(module: ir.Module) -> None:
    """`void run_program(memory, -, thread, threads)`; a program: number of kernels, then (kernel, args)."""
    code = Code(module, RUN)
    b, memory = code.b, code.args
    program, step = code.load(memory, _PROGRAM, pointer), code.load(memory, _STEP, pointer)
    threads, rested = code.variable(code.threads), code.variable(barrier.without_core(code))
    with code.loop(0, code.load(program, 0, i64)) as number:
        entry = code.at(program, code.add(code.mul(number, 16), 8))
        kernel, args = code.load(entry, 0, KERNEL.as_pointer()), code.load(entry, 8, pointer)
        b.call(kernel, [args, step, code.thread, threads.get()])
        threads.set(barrier.meet(code, memory, threads.get(), rested))
        with b.if_then(b.icmp_signed("==", threads.get(), code.integer(0)), likely=False):
            b.ret_void()
    code.finish()


def _lead(module: ir.Module) -> None:
    """`void lead(memory, step, program, threads)`: wakes the others and does the first thread's part."""
    code = Code(module, LEAD)
    b, memory = code.b, code.args
    program = b.inttoptr(code.thread, pointer)
    code.store(program, memory, _PROGRAM)
    code.store(code.step, memory, _STEP)
    with b.if_then(b.icmp_signed(">", code.threads, code.integer(1))):
        posts = b.load_atomic(code.at(memory, _POSTS), "monotonic", 8, typ=i64)
        count = b.add(barrier.low(code, posts), ir.Constant(i32, 1))
        b.atomic_rmw("xchg", code.at(memory, _POSTS), barrier.word(code, count, code.threads), "seq_cst")
        asleep = b.load_atomic(code.at(memory, _SLEEPERS), "seq_cst", 4, typ=i32)
        with b.if_then(b.icmp_signed(">", asleep, ir.Constant(i32, 0))):
            few = b.icmp_signed("<", code.threads, code.integer(_BITS))
            bits = b.sub(b.shl(ir.Constant(i32, 1), b.trunc(code.threads, i32)), ir.Constant(i32, 1))
            members = b.select(few, bits, ir.Constant(i32, -1))
            barrier.futex(code, code.at(memory, _POSTS), barrier.WAKE, ir.Constant(i32, _EVERY), members)
    with b.if_then(b.icmp_unsigned("!=", code.thread, code.integer(0))):
        b.call(module.globals[RUN], [memory, code.step, code.integer(0), code.threads])
    code.finish()


def _follow(module: ir.Module) -> None:
    """`void follow(memory, -, thread, threads)`: does its part of each program that is posted for it; returns when
    there is none in the post. The next post comes only after all whom the last one was for have met at the end of its
    program, so none is missed by those."""
    code = Code(module, FOLLOW)
    b, memory = code.b, code.args
    seen = code.variable(code.integer(0))
    waited = code.variable(code.integer(0))
    wait, spin, sleep, look, aside, work, run, end = (
        code.function.append_basic_block(name)
        for name in ("wait", "spin", "sleep", "look", "aside", "work", "run", "end")
    )
    b.branch(wait)
    b.position_at_end(wait)
    posts = b.load_atomic(code.at(memory, _POSTS), "acquire", 8, typ=i64)
    b.cbranch(b.icmp_signed("==", posts, seen.get()), spin, look)
    b.position_at_end(spin)
    code.pause()
    waited.set(code.add(waited.get(), 1))
    b.cbranch(b.icmp_signed(">", waited.get(), code.integer(AWAKE)), sleep, wait)
    b.position_at_end(sleep)
    last = code.integer(_BITS - 1)
    bit = b.select(b.icmp_signed("<", code.thread, last), code.thread, last)
    own = b.shl(ir.Constant(i32, 1), b.trunc(bit, i32))
    b.atomic_rmw("add", code.at(memory, _SLEEPERS), ir.Constant(i32, 1), "seq_cst")
    barrier.futex(code, code.at(memory, _POSTS), barrier.WAIT, barrier.low(code, seen.get()), own)
    b.atomic_rmw("sub", code.at(memory, _SLEEPERS), ir.Constant(i32, 1), "seq_cst")
    b.branch(wait)
    b.position_at_end(look)
    seen.set(posts)
    b.cbranch(b.icmp_signed(">", barrier.high(code, posts), code.thread), work, aside)
    b.position_at_end(aside)
    waited.set(code.integer(AWAKE))  # it would keep a core from those who work
    b.branch(wait)
    b.position_at_end(work)
    waited.set(code.integer(0))
    b.cbranch(b.icmp_unsigned("==", code.load(memory, _PROGRAM, i64), code.integer(0)), end, run)
    b.position_at_end(run)
    b.call(module.globals[RUN], [memory, code.step, code.thread, barrier.high(code, posts)])
    b.branch(wait)
    b.position_at_end(end)
    code.finish()


class Program:
    """Kernels with their arguments, as the tables that `run_program` reads. Keeps the tensors that it points to."""

    def __init__(self, kernels: Sequence[tuple[int, Sequence[int | torch.Tensor | None]]]) -> None:
        self._keep: list[object] = [args for _, args in kernels]
        tables = [torch.tensor([_value(arg) for arg in args] or [0], dtype=torch.int64) for _, args in kernels]
        entries: list[int] = []
        for (kernel, _), table in zip(kernels, tables, strict=True):
            entries += (kernel, table.data_ptr())
        self._table = torch.tensor([len(kernels), *entries], dtype=torch.int64)
        self._keep.append(tables)
        self.address = self._table.data_ptr()


def _value(arg: int | torch.Tensor | None) -> int:
    return arg.data_ptr() if isinstance(arg, torch.Tensor) else arg or 0


_CALL = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)


def run_alone(library: Library, kernel: str, step: torch.Tensor) -> None:
    """Run a kernel that has no arguments of its own on the calling thread."""
    _CALL(library.address(kernel))(None, step.data_ptr(), 0, 1)


class Team:
    """The calling thread and `threads - 1` others, which sleep between programs. They end when the team is dropped.

    `library`: of a module with `functions`. `yields`: while other processes want the cores, programs run with fewer
    threads (`crowding`); their results must not depend on that."""

    def __init__(self, library: Library, threads: int, *, yields: bool = False) -> None:
        self.threads = threads
        self._lead, follow = _CALL(library.address(LEAD)), _CALL(library.address(FOLLOW))
        held = torch.zeros(_MEMORY + barrier.APART, dtype=torch.uint8)
        self._memory = held.data_ptr() + -held.data_ptr() % barrier.APART
        self._crowding = Crowding(self._memory, threads) if yields and threads > 1 else None
        members = [
            threading.Thread(target=follow, args=(self._memory, 0, n, threads), name=f"octavo-cpu-{n}", daemon=True)
            for n in range(1, threads)
        ]
        for member in members:
            member.start()
        # the code and the memory stay until the members have left them
        self.close = weakref.finalize(self, _dismiss, self._lead, self._memory, members, (library, held))

    @property
    def running(self) -> int:
        """How many threads run programs now."""
        return self._crowding.threads if self._crowding else self.threads

    def run(self, program: Program, step: torch.Tensor) -> None:
        """Run a program on the threads; returns when all are done. One program at a time."""
        crowding = self._crowding
        if crowding is None:
            self._lead(self._memory, step.data_ptr(), program.address, self.threads)
            return
        self._lead(self._memory, step.data_ptr(), program.address, crowding.before())
        crowding.after()


def _dismiss(lead: Callable[..., None], memory: int, members: list[threading.Thread], _keep: object) -> None:
    lead(memory, 0, 0, len(members) + 1)
    for member in members:
        member.join()
