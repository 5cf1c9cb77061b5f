"""Where the threads of a team meet after each kernel, and how they sleep. Written into a module by `program.py`.

Who has waited for `SPINS` turns sleeps until the last one comes (futex(2)): if other processes want the same cores,
that leaves the core to the thread that all wait for, where one that stays awake and yields keeps coming back.
A team that may (`LIMIT`) also goes on with a thread fewer when waiting has cost too much: the last one to come decides.

The words are 64 bits: a count below, which a futex can sleep on, and above it how many threads take part from then on.
"""

from __future__ import annotations

import platform

from llvmlite import ir

from octavo_kernels.cpu.emit import Code, Value, Variable, i32, i64

SPINS = 8000
"""Turns of waiting before a thread sleeps: some 200 us. Threads that have a core each seldom wait so long: where work
does not divide evenly, as the attention of 3 heads to a long text by 2 threads."""
LEAST_LOST = 8_000_000
"""Nanoseconds that must be lost before a thread is left out: two ticks of a scheduler with 250 a second."""
APART = 128
"""Bytes between what different threads write: two cache lines, which processors fetch together."""
COUNT, TURN = 3 * APART, 4 * APART  # bytes in a team's memory
RESTING, TURNED, LOST, SINCE, LIMIT = (5 * APART + 8 * number for number in range(5))
"""Together, as they are written only when a thread sleeps, and by the caller: how many sleep; when the last turn came
for which some slept; nanoseconds since `SINCE` in which those waited for one that had no core; 1 if threads may be left
out, else 0. Times are monotonic."""
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
WAIT, WAKE = 128 + 9, 128 + 10
"""FUTEX_WAIT_BITSET and FUTEX_WAKE_BITSET among the threads of one process."""
_MONOTONIC, _THREAD = 1, 3  # clocks: of all, and of what the calling thread has run


def low(code: Code, word: Value) -> Value:
    return code.b.trunc(word, i32)


def high(code: Code, word: Value) -> Value:
    return code.b.lshr(word, code.integer(32))


def word(code: Code, count: Value, threads: Value) -> Value:
    return code.b.or_(code.b.zext(count, i64), code.b.shl(threads, code.integer(32)))


def without_core(code: Code) -> Value:
    """Nanoseconds that the calling thread did not run, since some time or other."""
    return code.sub(now(code), now(code, _THREAD))


def meet(code: Code, memory: Value, threads: Value, rested: Variable) -> Value:
    """Wait for all `threads`. Returns how many take part from here on; 0 if this thread does not. `rested`: what of
    `without_core` is not to count as lost, as it waited for others."""
    b = code.b
    turn_at = code.at(memory, TURN)
    turn = b.load_atomic(turn_at, "acquire", 8, typ=i64)
    before = b.atomic_rmw("add", code.at(memory, COUNT), ir.Constant(i64, 1), "acq_rel")
    is_last = b.icmp_signed("==", before, code.sub(threads, 1))
    last, others, after = (code.function.append_basic_block(name) for name in ("last", "others", "after"))
    b.cbranch(is_last, last, others)

    b.position_at_end(last)
    onwards = code.variable(threads)
    lost = b.load_atomic(code.at(memory, LOST), "monotonic", 8, typ=i64)
    with b.if_then(b.icmp_signed(">", lost, code.integer(LEAST_LOST)), likely=False):
        onwards.set(_fewer(code, memory, threads, lost))
    b.atomic_rmw("xchg", code.at(memory, COUNT), ir.Constant(i64, 0), "monotonic")
    following = b.add(low(code, turn), ir.Constant(i32, 1))
    b.atomic_rmw("xchg", turn_at, word(code, following, onwards.get()), "seq_cst")
    resting = b.load_atomic(code.at(memory, RESTING), "seq_cst", 4, typ=i32)
    with b.if_then(b.icmp_signed(">", resting, ir.Constant(i32, 0)), likely=False):
        code.store(now(code), memory, TURNED)
        futex(code, turn_at, WAKE, ir.Constant(i32, 2**31 - 1))
        rests = without_core(code)  # a thread that has more to do than others is late too, but it has its core
        b.atomic_rmw("add", code.at(memory, LOST), code.sub(rests, rested.get()), "monotonic")
        rested.set(rests)
    b.branch(after)

    b.position_at_end(others)
    _wait(code, memory, turn, rested, after)

    b.position_at_end(after)
    found = b.load_atomic(turn_at, "acquire", 8, typ=i64)
    # one that was left out may come here when the others have met again
    next_one = b.icmp_signed("==", low(code, found), b.add(low(code, turn), ir.Constant(i32, 1)))
    stays = b.and_(next_one, b.icmp_signed(">", high(code, found), code.thread))
    return b.select(stays, high(code, found), code.integer(0))


def _fewer(code: Code, memory: Value, threads: Value, lost: Value) -> Value:
    """One thread fewer, if all waited for one of them for more than that would cost: a `1 / threads` of the work, or a
    little less, as memory is not read so much slower."""
    b = code.b
    time = now(code)
    others = code.sub(threads, 1)
    passed = code.sub(time, code.load(memory, SINCE, i64))
    much = b.icmp_signed(">", code.mul(lost, code.add(threads, 1)), passed)
    leaves = b.and_(much, b.icmp_signed(">", code.mul(others, code.load(memory, LIMIT, i64)), code.integer(0)))
    with b.if_then(leaves):
        code.store(time, memory, SINCE)
        b.atomic_rmw("xchg", code.at(memory, LOST), ir.Constant(i64, 0), "monotonic")
    return b.select(leaves, others, threads)


def _wait(code: Code, memory: Value, turn: Value, rested: Variable, after: Value) -> None:
    b = code.b
    turn_at, resting_at = code.at(memory, TURN), code.at(memory, RESTING)
    spin, again, rest, sleep, woken = (
        code.function.append_basic_block(name) for name in ("spin", "again", "rest", "sleep", "woken")
    )
    others = b.block
    b.branch(spin)
    b.position_at_end(spin)
    waited = b.phi(i64)
    waited.add_incoming(ir.Constant(i64, 0), others)
    code.pause()
    b.cbranch(b.icmp_signed(">", waited, code.integer(SPINS)), rest, again)
    b.position_at_end(again)
    waited.add_incoming(code.add(waited, 1), again)
    b.cbranch(b.icmp_signed("==", b.load_atomic(turn_at, "acquire", 8, typ=i64), turn), spin, after)

    b.position_at_end(rest)
    fell = now(code)
    b.atomic_rmw("add", resting_at, ir.Constant(i32, 1), "seq_cst")
    b.branch(sleep)
    b.position_at_end(sleep)
    futex(code, turn_at, WAIT, low(code, turn))
    b.cbranch(b.icmp_signed("==", b.load_atomic(turn_at, "acquire", 8, typ=i64), turn), sleep, woken)
    b.position_at_end(woken)
    b.atomic_rmw("sub", resting_at, ir.Constant(i32, 1), "seq_cst")
    # it has rested until the last one came; since then it may have waited for a core
    came = b.load_atomic(code.at(memory, TURNED), "monotonic", 8, typ=i64)
    late = b.select(b.icmp_signed(">", came, fell), code.sub(now(code), came), code.integer(0))
    rested.set(code.sub(without_core(code), late))
    b.branch(after)


def now(code: Code, clock: int = _MONOTONIC) -> Value:
    """Nanoseconds; those of the first clock as `time.monotonic_ns` counts them."""
    time = code.stack(16)
    code.call("clock_gettime", i32, ir.Constant(i32, clock), time)
    return code.add(code.mul(code.load(time, 0, i64), 10**9), code.load(time, 8, i64))


def futex(code: Code, at: Value, operation: int, value: Value, members: Value = None) -> None:
    """`value`: the count for which to sleep on, or how many to wake. `members`: of a set of 32 the sleeper's own bits,
    or those to wake."""
    name = "syscall"
    function = code.module.globals.get(name)
    if function is None:
        function = ir.Function(code.module, ir.FunctionType(i64, [i64], var_arg=True), name)
    none = ir.Constant(i64, 0)
    members = ir.Constant(i32, -1) if members is None else members
    code.b.call(
        function, [code.integer(_SYS_FUTEX), at, ir.Constant(i32, operation), value, none, none, members]
    )
