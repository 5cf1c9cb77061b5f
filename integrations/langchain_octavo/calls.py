"""Running requests: one or many, their pieces as they come, a limit on the time, and a way for whoever leaves a batch
or a stream to end what it has under way.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from octavo.async_llm import AsyncLLM, AsyncTokenStream
from octavo.client import Prompt
from octavo.decode.assemble import Assembler
from octavo.engine.request import TokenEvent
from octavo.errors import RequestError, RequestFailedError
from octavo.llm import LLM
from octavo.outputs import RequestOutput, StreamPiece
from octavo.sampling_params import SamplingParams

Call = tuple[Prompt, SamplingParams]
OnPiece = Callable[[int, StreamPiece], None]
AsyncOnPiece = Callable[[int, StreamPiece], Awaitable[None]]


class UnderWay:
    """What a batch or a stream has in the engine, so that whoever leaves it can end that. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Running | AsyncRunning] = set()
        self._closed = False

    def add(self, running: Running | AsyncRunning) -> None:
        with self._lock:
            self._running.add(running)
            self.check()

    def check(self) -> None:
        """Raise if it was left."""
        if self._closed:
            raise RequestFailedError("the request was ended, as its batch or stream was left")

    def remove(self, running: Running | AsyncRunning) -> None:
        with self._lock:
            self._running.discard(running)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for one in running:
            one.close()


under_way: ContextVar[UnderWay | None] = ContextVar("octavo_under_way", default=None)
"""The batch or stream that the current thread or task works for."""


class Running:
    """Requests in the engine, and their pieces for `for number, piece in ...`. `close` ends those that still run.

    `timeout` is in seconds for all of them together; then they are ended and `TimeoutError` is raised. Waits while the
    engine's queue is full.
    """

    def __init__(self, llm: LLM, calls: Sequence[Call], timeout: float | None = None) -> None:
        self._events: queue.SimpleQueue[tuple[int, TokenEvent]] = queue.SimpleQueue()
        self._timeout = timeout
        self._until = None if timeout is None else time.monotonic() + timeout
        self._assemblers: list[Assembler] = []
        self._service = llm.engine.service
        for number, (prompt, params) in enumerate(calls):
            self._assemblers.append(self._made(llm, number, prompt, params, len(calls)))
        self._group = under_way.get()
        try:
            if self._group is not None:
                self._group.add(self)
            for assembler in self._assemblers:
                self._service.submit(assembler.request, wait=True)
            if self._group is not None:
                self._group.check()  # it may have been left meanwhile, before there was anything to end
        except BaseException:
            self.close()
            raise

    def _made(self, llm: LLM, number: int, prompt: Prompt, params: SamplingParams, count: int) -> Assembler:
        def sink(event: TokenEvent) -> None:
            self._events.put((number, event))

        try:
            return llm.make_request(prompt, params, sink)
        except RequestError as error:
            if count == 1:
                raise
            raise RequestError(f"prompt {number}: {error}", error.field) from error

    def __iter__(self) -> Iterator[tuple[int, StreamPiece]]:
        """Pieces as they come, of all requests, until all have ended. An error is raised at the end; leaving early ends
        them."""
        assemblers = self._assemblers
        try:
            left = len(assemblers)
            while left:
                number, event = self._next()
                assembler = assemblers[number]
                if assembler.done:
                    continue
                piece = assembler.push(event)
                left -= assembler.done
                if piece is not None:
                    yield number, piece
            for assembler in assemblers:
                if assembler.error is not None:
                    raise assembler.error
        finally:
            self.close()

    def _next(self) -> tuple[int, TokenEvent]:
        if self._until is None:
            return self._events.get()
        try:
            return self._events.get(timeout=max(0.0, self._until - time.monotonic()))
        except queue.Empty:
            raise _too_late(self._timeout) from None

    def close(self) -> None:
        """End what still runs. Any thread, any number of times."""
        if self._group is not None:
            self._group.remove(self)
        for assembler in self._assemblers:
            if not assembler.done:
                self._service.abort(assembler.request)

    def outputs(self) -> list[RequestOutput]:
        """Of all requests, everything so far."""
        return [assembler.output() for assembler in self._assemblers]


def run(llm: LLM, calls: Sequence[Call], timeout: float | None, on_piece: OnPiece | None = None) -> list[RequestOutput]:
    """Run all calls in one batch. `on_piece` is called in this thread, with the call's place in the list."""
    running = Running(llm, calls, timeout)
    for number, piece in running:
        if on_piece is not None:
            on_piece(number, piece)
    return [checked(output) for output in running.outputs()]


async def arun(
    llm: AsyncLLM, calls: Sequence[Call], timeout: float | None, on_piece: AsyncOnPiece | None = None
) -> list[RequestOutput]:
    """The same for asyncio. Cancelling it ends the requests."""
    try:
        async with asyncio.timeout(timeout):
            if on_piece is not None:
                return await _arun_reporting(llm, calls, on_piece)
            prompts, params = [call[0] for call in calls], [call[1] for call in calls]
            return [checked(output) for output in await llm.generate(prompts, params)]
    except TimeoutError:
        raise _too_late(timeout) from None


async def _arun_reporting(llm: AsyncLLM, calls: Sequence[Call], on_piece: AsyncOnPiece) -> list[RequestOutput]:
    streams: list[AsyncTokenStream] = []

    async def read(number: int, stream: AsyncTokenStream) -> RequestOutput:
        async for piece in stream:
            await on_piece(number, piece)
        return checked(stream.output)

    try:
        for prompt, params in calls:
            streams.append(await llm.begin(prompt, params))
        found = await asyncio.gather(*(read(*item) for item in enumerate(streams)), return_exceptions=True)
    finally:
        for stream in streams:
            stream.close()
    for output in found:
        if isinstance(output, BaseException):
            raise output
    return found  # type: ignore[return-value]


class AsyncRunning:
    """`Running` for asyncio and one request: begin it, then `async for piece in ...`."""

    def __init__(self, stream: AsyncTokenStream, until: float | None, timeout: float | None) -> None:
        self._stream, self._until, self._timeout = stream, until, timeout
        self._group = under_way.get()
        if self._group is not None:
            self._group.add(self)

    @classmethod
    async def begin(cls, llm: AsyncLLM, call: Call, timeout: float | None) -> AsyncRunning:
        """Hand the request over. Waits while the engine's queue is full."""
        until = None if timeout is None else asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(until):
                return cls(await llm.begin(*call), until, timeout)
        except TimeoutError:
            raise _too_late(timeout) from None

    async def __aiter__(self) -> AsyncIterator[StreamPiece]:
        """Pieces as they come. Leaving early ends the request."""
        stream = self._stream
        try:
            if self._until is None:
                async for piece in stream:
                    yield piece
                return
            while True:
                try:
                    async with asyncio.timeout_at(self._until):
                        piece = await anext(stream)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise _too_late(self._timeout) from None
                yield piece
        finally:
            self.close()

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._stream.output

    def close(self) -> None:
        """End it, if it still runs. Any number of times."""
        if self._group is not None:
            self._group.remove(self)
        self._stream.close()


def checked(output: RequestOutput) -> RequestOutput:
    """Raise for a request that was ended from outside: its text is a part of the answer only."""
    if any(choice.finish_reason == "abort" for choice in output.outputs):
        raise RequestFailedError("the request was ended before its answer was complete")
    return output


def checked_piece(piece: StreamPiece) -> StreamPiece:
    """The same for a stream."""
    if piece.finish_reason == "abort":
        raise RequestFailedError("the request was ended before its answer was complete")
    return piece


def checked_timeout(timeout: Any) -> float | None:
    """Seconds above 0, or None. Raises `RequestError`."""
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0):
        raise RequestError(f"timeout must be a number of seconds above 0, not {timeout!r}", "timeout")
    return timeout


def _too_late(timeout: Any) -> TimeoutError:
    return TimeoutError(f"no complete answer within timeout={timeout} seconds: the request was ended")
