"""Engine processes seen from the server's: one that is running, and one in advance (`SPARES`), which has imported all
that is slow and waits to be told which engine to be."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from octavo.engine.child import messages
from octavo.engine.child.messages import Beat, FromEngine, ToEngine
from octavo.errors import EngineClosedError
from octavo.processes.channel import ChannelClosedError, spawn
from octavo.processes.sender import Sender

LOOK_SECONDS = 0.25
STOPPED_SECONDS = 0.75
"""A process that is stopped, as by SIGSTOP, is given up after this."""
SILENT_SECONDS = 4.0
"""One that gives no sign of life, after this. A busy machine may keep a sound one from it for a second or two."""
STUCK_SECONDS = 120.0
"""One whose engine does not end a step, after this. No step is that long: they have a token budget."""
_END_SECONDS = 2.0
_SPINS = "2000"
"""Turns that a thread of torch stays awake for the others or for the next operator: under 0.1 ms. Left to itself GNU's
OpenMP makes it milliseconds, on the core that another thread or the server needs: with more processes than cores, a
tenth of the steps. Alone on the machine there was no difference (`benchmarks/LOG.md`)."""


class EngineProcess:
    """One process. Its messages are read on one thread (`receive`); any thread sends."""

    def __init__(self, program: Sequence[str]) -> None:
        self._process, self._channel = spawn(program, _torchs_threads())
        self._sender = Sender(self._channel)
        self.why = "it was killed"
        """The reason of its end, once `receive` has ended."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: ToEngine) -> None:
        """Never blocks: a process that hangs does not read. What is sent to one that has ended is lost."""
        self._sender.put(messages.encode(message))

    def receive(self, *, ready: bool) -> Iterator[FromEngine]:
        """Messages, until the process ends, or is ended because it hangs. `ready`: it has started, and must give signs
        of life."""
        seen = looked = time.monotonic()
        while True:
            try:
                message = messages.decode_from_engine(self._channel.receive(LOOK_SECONDS))
            except TimeoutError:
                now = time.monotonic()
                if now - looked > 4 * LOOK_SECONDS:
                    seen = now  # this process itself did not run
                looked = now
                if ready and self._hangs(now - seen):
                    self.kill()
                    return
                continue
            except ChannelClosedError:
                self._note_end()
                return
            seen = looked = time.monotonic()
            if isinstance(message, Beat):
                if message.step_seconds > STUCK_SECONDS:
                    self.why = f"a step did not end in {STUCK_SECONDS:.0f} s"
                    self.kill()
                    return
                continue
            yield message

    def _hangs(self, silent: float) -> bool:
        if silent > STOPPED_SECONDS and _is_stopped(self.pid):
            self.why = "it was stopped"
            return True
        self.why = f"it gave no sign of life for {SILENT_SECONDS:.0f} s"
        return silent > SILENT_SECONDS

    def _note_end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_END_SECONDS)
            self.why = f"it was ended by signal {-code}" if code < 0 else f"it exited with {code}"
        self.kill()

    def close(self) -> None:
        """Let it end: it does when its channel closes."""
        self._sender.close()
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self.kill()

    def kill(self) -> None:
        self._sender.close()
        self._channel.close()
        with suppress(OSError):
            self._process.kill()
        self._process.wait()


def _torchs_threads() -> dict[str, str]:
    """Variables for a process that has yet to load torch. Who has set how its threads wait meant it."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.intersection(os.environ)
    return {} if chosen else {"GOMP_SPINCOUNT": _SPINS}


def _is_stopped(pid: int) -> bool:
    """False where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


class Spares:
    """One process in advance for all engines of this process, as long as there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._spare: tuple[tuple[str, ...], EngineProcess] | None = None

    def join(self) -> None:
        """An engine may need one from now on."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            spare, self._spare = (self._spare, None) if not self._users else (None, self._spare)
        if spare is not None:
            spare[1].close()

    def prepare(self, program: tuple[str, ...]) -> None:
        """Have one."""
        with self._lock:
            if self._users and (self._spare is None or not self._spare[1].alive):
                self._spare = (program, EngineProcess(program))

    def take(self, program: tuple[str, ...]) -> EngineProcess:
        """A process that runs `program`: the one in advance, if it does."""
        with self._lock:
            spare = self._spare
            if spare is not None and spare[0] == program:
                self._spare = None
                if spare[1].alive:
                    return spare[1]
        return EngineProcess(program)


SPARES = Spares()


def closed(why: str) -> EngineClosedError:
    return EngineClosedError(f"the engine's process ended: {why}")
