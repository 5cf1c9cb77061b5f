"""A program is a list of kernels that all threads run one after the other, meeting at a barrier after each.

One call from Python runs a whole step of a model. `Team` owns the threads. Its members run no Python: they wait at a
mailbox in memory, for a moment awake and then asleep (a futex), so a program never waits for the interpreter's lock.
On 2 cores, 270 empty kernels (30 layers) take 0.05 ms, as many small additions by torch 0.33
(`benchmarks/cpu_program.py`).
"""

from __future__ import annotations

import ctypes
import platform
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from llvmlite import ir

from octavo_kernels.cpu.compiler import Library
from octavo_kernels.cpu.emit import KERNEL, Code, Value, i32, i64, pointer

RUN, LEAD, FOLLOW = "run_program", "lead", "follow"
SPINS = 2000
"""Turns of waiting before a thread lets others run: some 50 us. Threads that have a core each never wait so long."""
AWAKE = 40000
"""Turns of waiting for a program before a thread sleeps: 1 ms, more than passes between two steps of one request. Being
woken from sleep each time cost that request 4 % of its tokens."""
_COUNT, _TURN = 0, 64  # bytes in the barrier: each on a cache line of its own
_POSTS, _SLEEPERS, _PROGRAM, _STEP = 0, 64, 128, 136  # bytes in the mailbox
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE among the threads of one process (futex(2))


def functions(module: ir.Module) -> None:
    """What a module needs beside its kernels, to be run by a `Team`."""
    _run_program(module)
    _lead(module)
    _follow(module)


def _run_program(module: ir.Module) -> None:
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
    code.pause()
    b.cbranch(b.icmp_signed(">", waited, code.integer(SPINS)), rest, again)
    b.position_at_end(rest)
    code.call("sched_yield", i32)
    b.branch(again)
    b.position_at_end(again)
    waited.add_incoming(code.add(waited, 1), again)
    b.cbranch(b.icmp_signed("==", b.load_atomic(turn_at, "acquire", 8, typ=i64), turn), spin, after)
    b.position_at_end(after)


def _lead(module: ir.Module) -> None:
    """`void lead(mailbox, step, program, threads)`: wakes the others and does the first thread's part."""
    code = Code(module, LEAD)
    b, mailbox = code.b, code.args
    program = b.inttoptr(code.thread, pointer)
    code.store(program, mailbox, _PROGRAM)
    code.store(code.step, mailbox, _STEP)
    b.atomic_rmw("add", code.at(mailbox, _POSTS), ir.Constant(i32, 1), "seq_cst")
    asleep = b.load_atomic(code.at(mailbox, _SLEEPERS), "seq_cst", 4, typ=i32)
    with b.if_then(b.icmp_signed(">", asleep, ir.Constant(i32, 0))):
        _futex(code, mailbox, _WAKE, ir.Constant(i32, 2**31 - 1))
    with b.if_then(b.icmp_unsigned("!=", code.thread, code.integer(0))):
        b.call(module.globals[RUN], [program, code.step, code.integer(0), code.threads])
    code.finish()


def _follow(module: ir.Module) -> None:
    """`void follow(mailbox, -, thread, threads)`: runs each program that is posted; returns when there is none in the
    post. The next post comes only after all have met at the end of the last program, so none is missed."""
    code = Code(module, FOLLOW)
    b, mailbox = code.b, code.args
    seen = code.variable(ir.Constant(i32, 0))
    waited = code.variable(code.integer(0))
    wait, spin, sleep, work, run, end = (
        code.function.append_basic_block(name) for name in ("wait", "spin", "sleep", "work", "run", "end")
    )
    b.branch(wait)
    b.position_at_end(wait)
    posts = b.load_atomic(code.at(mailbox, _POSTS), "acquire", 4, typ=i32)
    b.cbranch(b.icmp_signed("==", posts, seen.get()), spin, work)
    b.position_at_end(spin)
    code.pause()
    waited.set(code.add(waited.get(), 1))
    b.cbranch(b.icmp_signed(">", waited.get(), code.integer(AWAKE)), sleep, wait)
    b.position_at_end(sleep)
    b.atomic_rmw("add", code.at(mailbox, _SLEEPERS), ir.Constant(i32, 1), "seq_cst")
    _futex(code, mailbox, _WAIT, seen.get())
    b.atomic_rmw("sub", code.at(mailbox, _SLEEPERS), ir.Constant(i32, 1), "seq_cst")
    b.branch(wait)
    b.position_at_end(work)
    seen.set(posts)
    waited.set(code.integer(0))
    program, step = code.load(mailbox, _PROGRAM, pointer), code.load(mailbox, _STEP, pointer)
    b.cbranch(b.icmp_unsigned("==", b.ptrtoint(program, i64), code.integer(0)), end, run)
    b.position_at_end(run)
    b.call(module.globals[RUN], [program, step, code.thread, code.threads])
    b.branch(wait)
    b.position_at_end(end)
    code.finish()


def _futex(code: Code, mailbox: Value, operation: int, value: Value) -> None:
    """`value`: the number of posts for which to sleep on, or how many to wake."""
    name = "syscall"
    function = code.module.globals.get(name)
    if function is None:
        function = ir.Function(code.module, ir.FunctionType(i64, [i64], var_arg=True), name)
    nothing = ir.Constant(pointer, None)
    posts = code.at(mailbox, _POSTS)
    code.b.call(function, [code.integer(_SYS_FUTEX), posts, ir.Constant(i32, operation), value, nothing])


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


_CALL = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)


def run_alone(library: Library, kernel: str, step: torch.Tensor) -> None:
    """Run a kernel that has no arguments of its own on the calling thread."""
    _CALL(library.address(kernel))(None, step.data_ptr(), 0, 1)


class Team:
    """The calling thread and `threads - 1` others, which sleep between programs. They end when the team is dropped.

    `library`: of a module with `functions`."""

    def __init__(self, library: Library, threads: int) -> None:
        self.threads = threads
        self._lead, follow = _CALL(library.address(LEAD)), _CALL(library.address(FOLLOW))
        memory = torch.zeros(32, dtype=torch.int64)
        self._mailbox = memory.data_ptr() + -memory.data_ptr() % 64
        members = [
            threading.Thread(target=follow, args=(self._mailbox, 0, n, threads), name=f"octavo-cpu-{n}", daemon=True)
            for n in range(1, threads)
        ]
        for member in members:
            member.start()
        # the code and the mailbox stay until the members have left them
        self.close = weakref.finalize(self, _dismiss, self._lead, self._mailbox, members, (library, memory))

    def run(self, program: Program, step: torch.Tensor) -> None:
        """Run a program on all threads; returns when all are done. One program at a time."""
        self._lead(self._mailbox, step.data_ptr(), program.address, self.threads)


def _dismiss(lead: Callable[..., None], mailbox: int, members: list[threading.Thread], _keep: object) -> None:
    lead(mailbox, 0, 0, 0)
    for member in members:
        member.join()
