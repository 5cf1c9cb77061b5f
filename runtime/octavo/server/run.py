"""The requests of one HTTP call, in the engine: made, handed over all or none, and read whole or piece by piece."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from octavo.async_llm import AsyncLLM
from octavo.decode.assemble import Assembler
from octavo.engine.request import TokenEvent
from octavo.errors import RequestError, RequestFailedError
from octavo.outputs import RequestMetrics, RequestOutput, StreamPiece
from octavo.post import post
from octavo.sampling_params import SamplingParams
from octavo.server.observe import Watch
from octavo.server.prompts import off_loop

Piece = tuple[int, StreamPiece]
"""With the place of its prompt in the call."""


class Run:
    """One call with one prompt or several. `close` ends what still runs; it never waits."""

    def __init__(self, llm: AsyncLLM, watch: Watch) -> None:
        self._llm, self._service, self._watch = llm, llm.engine.service, watch
        self._assemblers: list[Assembler] = []
        self._open = 0
        self._arrived: deque[Piece] | None = None
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        self._reported = False

    @classmethod
    async def start(
        cls, llm: AsyncLLM, prompts: Sequence[Any], params: SamplingParams, *, priority: int, special: bool,
        stream: bool, size: int, watch: Watch,
    ) -> Run:  # fmt: skip
        """Hand over one request for each of `prompts`.

        Args:
            stream: pieces are wanted, not the whole alone.
            size: characters that are to be tokenised.

        Raises:
            RequestError: a prompt or parameter is bad; nothing runs then.
            QueueFullError: there is no room for all of them; nothing runs then.
        """
        run = cls(llm, watch)
        if stream:
            run._arrived = deque()
        sinks = [post().sink(partial(run._take, place)) for place in range(len(prompts))]

        def make() -> None:
            for place, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
                try:
                    made = llm.make_request(prompt, params, sink, priority=priority, special=special, constrain=False)
                except RequestError as error:
                    if len(prompts) == 1:
                        raise
                    raise RequestError(f"prompt {place}: {error}", error.field) from error
                run._assemblers.append(made)

        try:
            await off_loop(size, make)
            await llm.compile_grammars([one.request for one in run._assemblers])
            run._open = len(run._assemblers)
            for one in run._assemblers:
                run._service.submit(one.request)
        except BaseException as error:
            run._fail(error)
            raise
        return run

    # ---------------------------------------------------------------- on the event loop, for each event

    def _take(self, place: int, event: TokenEvent) -> None:
        """Must not raise: the events of all other calls come the same way."""
        assembler = self._assemblers[place]
        done_before = assembler.done
        if self._error is not None or done_before:
            return
        try:
            piece = assembler.push(event)
            if event.token_ids:
                self._watch.tokens(len(event.token_ids))
        except Exception as error:
            return self._fail(error)
        if assembler.error is not None:
            return self._fail(assembler.error)
        if assembler.done:
            self._open -= 1
        if self._arrived is not None and piece is not None:
            self._arrived.append((place, piece))
            self._news.set()
        elif self._open == 0:
            self._news.set()

    def _fail(self, error: BaseException) -> None:
        """All of the call ends with the first error of one of its requests."""
        if self._error is None:
            self._error = error
            self._abort()
            self._report(error)
        self._news.set()

    # ---------------------------------------------------------------- for the endpoint

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Of each prompt."""
        return [one.request.prompt_ids for one in self._assemblers]

    @property
    def prompt_texts(self) -> list[str | None]:
        """Of each prompt, where it was given as text."""
        return [one.prompt for one in self._assemblers]

    @property
    def metrics(self) -> list[RequestMetrics]:
        """Of each prompt, so far."""
        return [one.request.metrics for one in self._assemblers]

    async def whole(self) -> list[RequestOutput]:
        """Every output, once all have ended."""
        try:
            await self._news.wait()
        except BaseException as error:
            self._fail(error)
            raise
        if self._error is not None:
            raise self._error
        return self.outputs()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What is new, as it comes: all that came meanwhile at once. An error is raised after what came before it."""
        assert self._arrived is not None
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                if self._arrived:
                    found = list(self._arrived)
                    self._arrived.clear()
                    yield found
                if self._error is not None:
                    raise self._error
                if self._open == 0 and not self._arrived:
                    return
        except BaseException as error:
            self._fail(error)
            raise

    def outputs(self) -> list[RequestOutput]:
        """Of all prompts, once all have ended. Raises `RequestFailedError` if one was ended from outside."""
        found = [one.output() for one in self._assemblers]
        reasons = [choice.finish_reason or "abort" for output in found for choice in output.outputs]
        if "abort" in reasons:
            error = RequestFailedError("the request was ended before its answer was complete")
            self._report(error)
            raise error
        self._report(None, found, reasons)
        return found

    def close(self) -> None:
        if self._open and self._error is None:
            self._fail(asyncio.CancelledError())

    def _abort(self) -> None:
        for one in self._assemblers:
            if not one.done:
                self._service.abort(one.request)

    def _report(
        self, error: BaseException | None, found: Sequence[RequestOutput] = (), reasons: Sequence[str] = ()
    ) -> None:
        if self._reported:
            return
        self._reported = True
        if error is not None:
            self._watch.error(error)
        else:
            self._watch.end([output.metrics for output in found], reasons)
