"""The program of an engine's process: `python -m octavo.engine.child.program DESCRIPTOR`.

It imports what is slow, then waits to be told which engine to be: so it can be started in advance. After that it is the
engine until the channel closes, which it does when the server's process ends, however that ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from octavo.config import EngineConfig
from octavo.decode.grammar import Grammars
from octavo.engine.child import messages
from octavo.engine.child.messages import Answer, Beat, Embed, Failed, Files, Generate, Loading, Problem, Ready, Start
from octavo.engine.child.outbox import Outbox, ReportingCore
from octavo.engine.contract import Core, Work
from octavo.engine.embed_request import EmbedEvent, EmbedRequest
from octavo.engine.request import Request, TokenEvent
from octavo.engine.service import EngineService
from octavo.engine.start import Limits, load_front, load_shape, start_service
from octavo.errors import EngineClosedError, RequestError, RequestFailedError
from octavo.host_memory import collector_paused
from octavo.processes.channel import Channel, ChannelClosedError

logger = logging.getLogger("octavo")
BEAT_SECONDS = 0.25
_NO_BOUND = sys.maxsize
"""Of the queue: who sends the requests has counted them."""


class ChildEngine:
    """What this process is."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._outbox = Outbox(self._send)
        self._core: ReportingCore | None = None
        self._works: dict[int, Work] = {}
        self._compiling: dict[int, Request] = {}
        """Requests that the engine is to get as soon as they have their grammars."""
        self._changing = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, "octavo-grammars")
        """Steps go on while a grammar is compiled; the library leaves the interpreter to them."""

    def run(self) -> None:
        """Until the channel closes."""
        threading.Thread(target=self._beat, daemon=True).start()
        _import_engine()
        start = messages.decode_to_engine(self._channel.receive())
        assert isinstance(start, Start)
        try:
            with collector_paused():
                self._service, limits = self._start(start.config, start.files)
        except Exception as error:
            logger.debug("the engine could not start", exc_info=True)
            self._send(Failed(Problem.of(error)))
            return
        threading.Thread(target=self._watch, daemon=True).start()
        self._send(Ready(limits))
        self._compiler.submit(lambda: self._grammars)  # the tokenizer that grammars need takes a second
        while True:
            self._take(messages.decode_to_engine(self._channel.receive()))

    def _start(self, config: EngineConfig, given: Files) -> tuple[EngineService, Limits]:
        files = given.files()
        shape = load_shape(files)
        self._model = config, files, shape

        def wrap(core: Core) -> Core:
            self._core = ReportingCore(core, self._outbox)
            return self._core

        unbounded = replace(config, max_queued_requests=_NO_BOUND)
        return start_service(unbounded, files, shape, self._progress, wrap)

    @cached_property
    def _grammars(self) -> Grammars:
        """Of the compiler's thread alone."""
        return load_front(*self._model).grammars

    def _progress(self, label: str, done: int, total: int | None) -> None:
        self._send(Loading(label, done, total))

    def _send(self, message: messages.FromEngine) -> None:
        self._channel.send(messages.encode(message))

    # ---------------------------------------------------------------- threads beside the engine's

    def _beat(self) -> None:
        wake = threading.Event()
        with suppress(ChannelClosedError):
            while True:
                self._send(Beat(0.0 if self._core is None else self._core.step_seconds))
                wake.wait(BEAT_SECONDS)
        os._exit(0)  # the server is gone; nobody waits for what runs here

    def _watch(self) -> None:
        """An engine whose loop has failed cannot go on: end, and be replaced."""
        self._service.wait()
        os._exit(1)

    def _ask(self, ticket: int) -> None:
        """The answer waits for the step."""
        with suppress(EngineClosedError, ChannelClosedError):
            self._send(Answer(ticket, self._service.stats()))

    # ---------------------------------------------------------------- requests

    def _take(self, message: messages.ToEngine) -> None:
        if isinstance(message, Generate):
            self._generate(message)
        elif isinstance(message, Embed):
            self._embed(message)
        elif isinstance(message, messages.Abort):
            self._abort(message.number, message.index)
        elif isinstance(message, messages.Ask):
            threading.Thread(target=self._ask, args=(message.ticket,), daemon=True).start()

    def _embed(self, message: Embed) -> None:
        number = message.number

        def sink(event: EmbedEvent) -> None:
            self._works.pop(number, None)
            self._outbox.put_vector(number, event)

        text = EmbedRequest(str(number), message.prompt_ids, sink)
        text.metrics.arrival = message.arrival
        self._submit(number, text)

    def _generate(self, message: Generate) -> None:
        request = _request(message)
        request.sink = partial(self._event, message.number, request)
        if message.params.structured_outputs is not None:
            with self._changing:
                self._compiling[message.number] = request
            self._compiler.submit(self._constrain, message, request)
            return
        if message.made is not None:
            request.resume(message.made)
        self._submit(message.number, request)

    def _constrain(self, message: Generate, request: Request) -> None:
        """On the compiler's thread."""
        form = message.params.structured_outputs
        assert form is not None
        error: Exception | None = None
        if not request.finished:
            try:
                request.constrain(self._grammars.compile(form).start)
                if message.made is not None:
                    request.resume(message.made)
            except RequestError as refused:
                error = refused
            except Exception as failure:
                error = RequestFailedError(f"the grammar could not be compiled: {type(failure).__name__}: {failure}")
        with self._changing:
            if self._compiling.pop(message.number, None) is None:
                return
            if error is None:
                self._submit(message.number, request)
                return
        request.fail(error)
        self._outbox.flush()

    def _submit(self, number: int, work: Request | EmbedRequest) -> None:
        self._works[number] = work
        self._outbox.accepted(number, work.metrics)
        with suppress(EngineClosedError):  # this process ends in a moment
            self._service.submit(work)

    def _event(self, number: int, request: Request, event: TokenEvent) -> None:
        if request.finished:
            self._works.pop(number, None)
        self._outbox.put_token(number, request, event)

    def _abort(self, number: int, index: int | None) -> None:
        """Who sends this has told the caller already: nobody waits for the event."""
        with self._changing:
            compiling = self._compiling.get(number)
            if compiling is not None:
                for sequence in compiling.sequences:
                    sequence.finished = sequence.finished or index in (None, sequence.index)
                if compiling.finished:
                    del self._compiling[number]
                return
        work = self._works.get(number)
        if work is not None:
            self._service.abort(work, index)


def _request(message: Generate) -> Request:
    request = Request(
        str(message.number), message.prompt_ids, message.params, lambda event: None, max_tokens=message.max_tokens,
        eos_token_ids=message.eos_token_ids, bad_word_ids=message.bad_word_ids, seed=message.seed,
        priority=message.priority, cache_salt=message.cache_salt, source_ids=message.source_ids,
        length_offset=message.length_offset,
    )  # fmt: skip
    request.metrics.arrival = message.arrival
    return request


def _import_engine() -> None:
    import octavo.execute.build
    import octavo.execute.encoder
    import octavo.execute.seq2seq  # noqa: F401


def _be_the_first_to_go() -> None:
    """Where the machine's memory runs out, this process can be replaced and the server cannot."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _be_the_first_to_go()
    with suppress(ChannelClosedError):
        ChildEngine(Channel.of_descriptor(int(sys.argv[-1]))).run()
    os._exit(0)  # in order would take a second, and there is nobody for whom it matters


if __name__ == "__main__":
    main()
