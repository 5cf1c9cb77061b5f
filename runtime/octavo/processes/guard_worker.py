"""The program in which hostile grammars and templates do their worst: `python -m octavo.processes.guard_worker FD`.
Started by `guard.Guard`, which says what it is for.

It knows the models' vocabularies, and each job runs in a child forked from it, which has a bound on its time and its
memory. A child that goes beyond them ends, and nothing else does; what it took goes back to the system.

Two children run at a time, in two lanes. A new job has the quick lane for `QUICK_SECONDS`, which is enough for nearly
all of them. One that takes longer goes over to the slow lane, or stands still (SIGSTOP) until that is free. So slow
jobs, however many, hold up others by no more than their first `QUICK_SECONDS`, and when `MOST_SLOW` of them stand still
the next one is sent away.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import sys
import time
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads would be lost in children, and nothing here multiplies matrices

import tokenizers

from octavo.decode.grammar import Grammars
from octavo.processes import guard_jobs
from octavo.processes.channel import Channel, ChannelClosedError
from octavo.processes.guard_messages import Answer, Forget, Job, Learn, Outcome, decode_order, encode
from octavo.tokenizer import Tokenizer

QUICK_SECONDS = 0.15
CPU_SECONDS = 0.5
"""Of a processor, for a job: the kernel ends a child that took them (SIGPROF)."""
WALL_SECONDS = 0.85
"""By the clock, without those in which it stood still: whoever waits is to be told within a second. But it goes on
until it had `FAIR_SECONDS` of a processor, if others leave it so little, for `MOST_SECONDS` at most."""
FAIR_SECONDS = CPU_SECONDS / 2
MOST_SECONDS = 3.0
MEMORY = 256 << 20
"""Bytes that a child may have beside what it was born with."""
LOOK_SECONDS = 0.05
MOST_SLOW = 8
"""Jobs that stand still. What each has is what it took in `QUICK_SECONDS`: 40 MB at most, by hand."""
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_libc = ctypes.CDLL(None)


@dataclass
class _Child:
    """A job that runs, or stands still."""

    job: Job
    pid: int
    pipe: int
    """From which its answer comes."""
    since: float = field(default_factory=time.monotonic)
    """When it last began to run."""
    ran: float = 0.0
    """Seconds before that."""
    found: bytearray = field(default_factory=bytearray)

    def seconds(self) -> float:
        return self.ran + time.monotonic() - self.since

    def cpu_seconds(self) -> float:
        """Of a processor, that it took."""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                ticks = file.read().rpartition(")")[2].split()[11:13]
            return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        except OSError:  # another system than Linux: as if it had all
            return self.seconds()

    def stop(self) -> None:
        self.ran = self.seconds()
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        self.since = time.monotonic()
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)


class Worker:
    """The loop. One thread, so that a fork loses nothing."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._grammars: dict[int, Grammars] = {}
        self._new: deque[Job] = deque()
        self._quick: _Child | None = None
        self._slow: _Child | None = None
        self._still: deque[_Child] = deque()
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)

    def run(self) -> None:
        """Until the other end of the channel is gone."""
        try:
            while True:
                self._wait()
                self._take()
                self._judge()
                self._begin()
        except ChannelClosedError:
            for child in filter(None, (self._quick, self._slow, *self._still)):
                child.kill()

    # ---------------------------------------------------------------- what comes in

    def _wait(self) -> None:
        """For an order, an answer, or the end of someone's time."""
        ends = []
        if self._quick is not None:
            ends.append(QUICK_SECONDS - self._quick.seconds())
        if self._slow is not None:
            ends.append(WALL_SECONDS - self._slow.seconds())
        for place, _ in self._poll.poll(max(min(ends), LOOK_SECONDS) * 1000 if ends else None):
            for child in (self._quick, self._slow):
                if child is not None and child.pipe == place:
                    self._read(child)

    def _take(self) -> None:
        """All orders that are there."""
        while True:
            try:
                order = decode_order(self._channel.receive(0))
            except TimeoutError:
                return
            if isinstance(order, Job):
                self._new.append(order)
            elif isinstance(order, Forget):
                self._grammars.pop(order.model, None)
            else:
                self._learn(order)

    def _learn(self, order: Learn) -> None:
        backend = tokenizers.Tokenizer.from_str(order.backend)
        grammars = Grammars(Tokenizer(backend, order.named, "the tokenizer"), order.vocab_size, order.ends)
        grammars.warm()
        self._grammars[order.model] = grammars
        gc.collect()
        gc.freeze()  # or children would copy pages to mark what is theirs

    def _read(self, child: _Child) -> None:
        """Its answer, or a part of it; at the end, pass it on."""
        data = os.read(child.pipe, 1 << 20)
        child.found += data
        if data:
            return
        self._poll.unregister(child.pipe)
        os.close(child.pipe)
        _, status = os.waitpid(child.pid, 0)
        if child.found and status == 0:
            self._channel.send(bytes(child.found))
        else:
            self._answer(child.job, _outcome(status))
        self._leave(child)

    def _answer(self, job: Job, outcome: Outcome) -> None:
        self._channel.send(encode(Answer(job.number, outcome)))

    # ---------------------------------------------------------------- who runs

    def _judge(self) -> None:
        """Whose time is over."""
        slow, quick = self._slow, self._quick
        if slow is not None and slow.seconds() >= WALL_SECONDS:
            if slow.cpu_seconds() >= FAIR_SECONDS:
                self._end(slow, "slow")
            elif slow.seconds() >= MOST_SECONDS:
                self._end(slow, "late")
        if quick is None or quick.seconds() < QUICK_SECONDS:
            return
        if self._slow is None:
            self._slow, self._quick = quick, None
        elif len(self._still) < MOST_SLOW:
            quick.stop()
            self._poll.unregister(quick.pipe)
            self._still.append(quick)
            self._quick = None
        elif quick.cpu_seconds() >= QUICK_SECONDS / 3:  # or it is no fault of its own
            self._end(quick, "busy")

    def _end(self, child: _Child, outcome: Outcome) -> None:
        self._poll.unregister(child.pipe)
        child.kill()
        self._answer(child.job, outcome)
        self._leave(child)

    def _leave(self, child: _Child) -> None:
        if child is self._quick:
            self._quick = None
        else:
            self._slow = None

    def _begin(self) -> None:
        if self._slow is None and self._still:
            self._slow = self._still.popleft()
            self._poll.register(self._slow.pipe, select.POLLIN)
            self._slow.go_on()
        if self._quick is None and self._new:
            self._quick = self._fork(self._new.popleft())

    def _fork(self, job: Job) -> _Child:
        ours, theirs = os.pipe()
        parent, pid = os.getpid(), os.fork()
        if pid:
            os.close(theirs)
            self._poll.register(ours, select.POLLIN)
            return _Child(job, pid, ours)
        try:
            os.close(ours)
            os.close(self._channel.fileno())
            _bound(parent)
            with os.fdopen(theirs, "wb") as pipe:
                pipe.write(encode(guard_jobs.run(job, self._grammars)))
        except BaseException:
            os._exit(1)
        os._exit(0)


def _bound(parent: int) -> None:
    """In a child: no more than its share, no word, and no life without the worker."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _libc.prctl(_PARENT_DEATH, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[5])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)


def _outcome(status: int) -> Outcome:
    """Of a child that left no answer."""
    ended_by = os.waitstatus_to_exitcode(status)
    if ended_by == -signal.SIGPROF:
        return "slow"
    return "large" if ended_by in (-signal.SIGABRT, -signal.SIGKILL) else "broken"


def main(descriptor: int) -> None:
    """Runs until the parent ends the channel, or is gone."""
    warnings.simplefilter("ignore")
    guard_jobs.warm()
    Worker(Channel.of_descriptor(descriptor)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
