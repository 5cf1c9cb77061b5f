"""Streams that end their request at once when they are left. Both classes inherit `LeavableStreams`.

LangChain's streams are generators, and an asynchronous generator that is dropped is only closed when the event loop
comes round to it, each one inside it a round later.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
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

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
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
