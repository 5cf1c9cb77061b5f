"""The guard: what clients send that can explode (grammars, schemas, chat templates) is done first in a process that can
be killed. This is the server's side; `guard_worker` is that process, and says how it bounds a job.

One `Guard` serves all models of a server. Made by `server.models`; asked by `guarded` (grammars, schemas) and by
`server.planning` (templates).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from octavo.errors import EngineClosedError, QueueFullError, RequestFailedError
from octavo.processes.channel import Channel, ChannelClosedError, module_program, spawn
from octavo.processes.guard_messages import Answer, Forget, Job, Kind, Learn, decode_answer, encode
from octavo.processes.sender import Sender

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

logger = logging.getLogger("octavo.guard")

MOST_WAITING = 64
"""Jobs that are not answered; one more is refused with `QueueFullError`."""
TRIES = 2
"""Workers that a job is given to, if they die with it: it may be the reason."""
SILENCE_SECONDS = 60.0
"""A worker that says nothing for so long, with jobs to do, is replaced. It may be learning a vocabulary."""
_LOOK_SECONDS = 1.0
_PROGRAM = module_program("octavo.processes.guard_worker")


class Guard:
    """Any thread may call it; nothing here waits but `close`. The worker is started by the first thing that it is told,
    and replaced when it dies."""

    def __init__(self, program: Sequence[str] = _PROGRAM) -> None:
        self._program = tuple(program)
        self._lock = threading.Lock()
        self._models: dict[int, bytes] = {}
        """What the worker is told of each."""
        self._jobs: dict[int, _Waiting] = {}
        self._made = 0
        self._sender: Sender | None = None
        """To the worker, which does not read while it learns."""
        self._channel: Channel | None = None
        self._keeper: threading.Thread | None = None
        self._closed = threading.Event()
        self.pid: int | None = None
        """Of the worker, while there is one."""

    # ---------------------------------------------------------------- for callers

    def learn(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> int:
        """A number for a model, whose vocabulary the worker reads at once. Takes a moment."""
        backend = tokenizer.backend.to_str()
        with self._lock:
            self._made += 1
            model = self._made
            order = encode(Learn(model, backend, tokenizer.named_special_tokens, vocab_size, list(ends)))
            self._models[model] = order
            self._start()
            self._say(order)
        return model

    def forget(self, model: int) -> None:
        """It is not asked about any more."""
        with self._lock:
            if self._models.pop(model, None) is not None:
                self._say(encode(Forget(model)))

    def ask(self, kind: Kind, body: str, model: int = 0) -> Future[Answer]:
        """Have a job done. Raises `QueueFullError` where too many wait. The future cannot be cancelled; it fails only
        if there is no worker to be had."""
        with self._lock:
            if self._closed.is_set():
                raise EngineClosedError("the server is ending")
            if len(self._jobs) >= MOST_WAITING:
                raise QueueFullError(f"{MOST_WAITING} grammars and templates wait already")
            self._made += 1
            waiting = _Waiting(encode(Job(self._made, kind, model, body)))
            self._jobs[self._made] = waiting
            if self._start():
                waiting.tries = 1
                self._say(waiting.order)
        return waiting.future

    def close(self) -> None:
        """End the worker. Who waits gets an `EngineClosedError`. Safe to call twice."""
        with self._lock:
            self._closed.set()
            channel, keeper = self._channel, self._keeper
        if channel is not None:
            channel.close()
        if keeper is not None:
            keeper.join()

    # ---------------------------------------------------------------- under the lock

    def _start(self) -> bool:
        """Whether there is a worker now; else one is on its way, and will be told all."""
        if self._keeper is None and not self._closed.is_set():
            self._keeper = threading.Thread(target=self._keep, name="octavo-guard", daemon=True)
            self._keeper.start()
        return self._sender is not None

    def _say(self, order: bytes) -> None:
        if self._sender is not None:
            self._sender.put(order)

    # ---------------------------------------------------------------- the keeper's thread

    def _keep(self) -> None:
        """One worker after the other."""
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                process, channel = spawn(self._program)
            except OSError:
                logger.exception("the guard's worker cannot be started")
                self._closed.wait(_LOOK_SECONDS)
                continue
            self.pid = process.pid
            sender = Sender(channel)
            self._tell_all(channel, sender)
            try:
                self._listen(channel)
            except ChannelClosedError:
                pass
            finally:
                with self._lock:
                    self._sender = self._channel = None
                sender.close()
                channel.close()
                process.kill()
                code = process.wait()
                self.pid = None
            if not self._closed.is_set():
                logger.warning("the guard's worker ended (%s): another is started", code)
                self._closed.wait(max(0.0, _LOOK_SECONDS - (time.monotonic() - began)))
        self._give_up(list(self._jobs), EngineClosedError("the server is ending"))

    def _tell_all(self, channel: Channel, sender: Sender) -> None:
        """Tell a new worker what it has to know, and the jobs that were not answered by another."""
        with self._lock:
            tired = [number for number, job in self._jobs.items() if job.tries >= TRIES]
        self._give_up(tired, RequestFailedError("the guard's worker died of it"))
        with self._lock:
            for order in self._models.values():
                sender.put(order)
            for job in self._jobs.values():
                job.tries += 1
                sender.put(job.order)
            self._sender, self._channel = sender, channel
            if self._closed.is_set():  # `close` did not see this channel
                channel.close()

    def _listen(self, channel: Channel) -> None:
        """Until the worker is gone, or silent for too long."""
        heard = time.monotonic()
        while True:
            try:
                answer = decode_answer(channel.receive(_LOOK_SECONDS))
            except TimeoutError:
                if not self._jobs:
                    heard = time.monotonic()
                elif time.monotonic() - heard > SILENCE_SECONDS:
                    logger.error("the guard's worker is silent")
                    return
                continue
            heard = time.monotonic()
            with self._lock:
                job = self._jobs.pop(answer.number, None)
            if job is not None:
                job.future.set_result(answer)

    def _give_up(self, numbers: Sequence[int], error: Exception) -> None:
        for number in numbers:
            with self._lock:
                job = self._jobs.pop(number)
            job.future.set_exception(error)


class _Waiting:
    """A job that is not answered."""

    def __init__(self, order: bytes) -> None:
        self.order, self.tries = order, 0
        self.future: Future[Answer] = Future()
        self.future.set_running_or_notify_cancel()  # several may wait for it: none of them may cancel it
