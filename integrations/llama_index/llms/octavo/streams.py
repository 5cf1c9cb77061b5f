"""What the stream_* calls return: LlamaIndex's generators, with a hand on the request behind them.

LlamaIndex's callbacks wrap a generator in one of their own, and an event handler that keeps the event of an early end
keeps that generator's frame too. So the request is ended here, whatever becomes of the generators: when the stream is
closed, when it is dropped, and (by the token streams themselves) when waiting for it is cancelled.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, TypeVar

from octavo.async_llm import AsyncTokenStream
from octavo.llm import TokenStream

R = TypeVar("R")


class ResponseStream(Generator[R, None, None]):
    """Responses of one request."""

    def __init__(self, responses: Generator[R, None, None], request: TokenStream) -> None:
        self._responses, self._request = responses, request

    def __next__(self) -> R:
        return next(self._responses)

    def send(self, value: None) -> R:
        return self._responses.send(value)

    def throw(self, *error: Any) -> R:
        return self._responses.throw(*error)

    def close(self) -> None:
        """End the request if it still runs."""
        self._request.close()
        self._responses.close()

    def __del__(self) -> None:
        self._request.close()


class AsyncResponseStream(AsyncGenerator[R, None]):
    """Responses of one request, for `async for`."""

    def __init__(self, responses: AsyncGenerator[R, None], request: AsyncTokenStream) -> None:
        self._responses, self._request = responses, request

    def __anext__(self) -> Any:
        return self._responses.__anext__()

    def asend(self, value: None) -> Any:
        return self._responses.asend(value)

    def athrow(self, *error: Any) -> Any:
        return self._responses.athrow(*error)

    async def aclose(self) -> None:
        """End the request if it still runs."""
        self._request.close()
        await self._responses.aclose()

    def __del__(self) -> None:
        self._request.close()
