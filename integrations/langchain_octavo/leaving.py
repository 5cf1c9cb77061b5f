"""Streams that end their request at once when they are left. Both classes inherit `LeavableStreams`.

LangChain's streams are generators, and an asynchronous generator that is dropped is only closed when the event loop
comes round to it, each one inside it a round later. And when a chain's synchronous stream is left, the steps behind the
model read the rest of the model's stream, for their traces alone: it would go on to its end.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from types import FrameType, GeneratorType
from typing import Any

from langchain_core.runnables import Runnable

from langchain_octavo.calls import UnderWay, under_way


class LeavableStreams(Runnable[Any, Any]):
    """Overrides of `Runnable`, over the streams of the class behind it."""

    def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:
        """Yield the answer as it is made. Leaving the loop ends the request."""
        return _Stream(super().stream(input, config, **kwargs))

    def astream(self, input: Any, config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
        """The same for asyncio."""
        return _AsyncStream(super().astream(input, config, **kwargs))


class _Stream:
    def __init__(self, inner: Any) -> None:
        self._inner, self._group = inner, UnderWay()
        self._in_chain: bool | None = None
        """Whether other steps stand behind it; None: not read yet."""

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        if self._in_chain is None:
            self._in_chain = next(_steps_behind(), None) is not None
        if self._in_chain and not all(step.gi_running for step in _steps_behind()):
            self.close()  # a step has ended, and reads on for its trace
            raise StopIteration
        outer = under_way.set(self._group)
        try:
            return next(self._inner)
        finally:
            under_way.reset(outer)

    def close(self) -> None:
        self._group.close()
        self._inner.close()

    def __del__(self) -> None:
        self._group.close()


def _steps_behind() -> Iterator[GeneratorType[Any, Any, Any]]:
    """The generators of a chain's steps through which the stream is read: all run, unless one of them has ended."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "_transform_stream_with_config":
            step = frame.f_locals.get("iterator")
            if isinstance(step, GeneratorType):
                yield step
        frame = frame.f_back


class _AsyncStream:
    def __init__(self, inner: Any) -> None:
        self._inner, self._group = inner, UnderWay()

    def __aiter__(self) -> _AsyncStream:
        return self

    async def __anext__(self) -> Any:
        outer = under_way.set(self._group)
        try:
            return await anext(self._inner)
        finally:
            under_way.reset(outer)

    async def aclose(self) -> None:
        self._group.close()
        await self._inner.aclose()

    def __del__(self) -> None:
        self._group.close()
