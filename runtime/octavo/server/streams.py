"""Server-sent events: frames as bytes, and the response that sends them. Called by the endpoints that stream.

A stream ends with its client: when it has gone, or takes nothing for too long, the generator of its frames is closed,
and with that its request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.errors import api_error

DONE = b"data: [DONE]\n\n"
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
Frames = AsyncGenerator[bytes, None]


def frame(data: Any) -> bytes:
    """One event without a name."""
    return f"data: {_dumps(data)}\n\n".encode()


def named_frame(name: str, data: Any) -> bytes:
    """One event with a name, as the responses API has them."""
    return f"event: {name}\ndata: {_dumps(data)}\n\n".encode()


def json_text(text: str) -> str:
    """A string as JSON."""
    return _dumps(text)


class EventStream(Response):
    """Sends the frames of a generator. An error that it raises becomes the last event: the status is sent already."""

    media_type = "text/event-stream"

    def __init__(self, frames: Frames, held: AsyncExitStack, *, request_id: str, write_seconds: float) -> None:
        """`held` is closed at the end, begun or not."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames, self._held = frames, held
        self._request_id, self._write_seconds = request_id, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.current_task()
        assert sending is not None
        gone = asyncio.create_task(_when_gone(receive, sending.cancel))
        patience = _Patience(self._write_seconds, sending)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # a token is a few letters: the layers between, which look at the start alone, would cost as much as they
            await self._send_all(scope["state"].get("send_body", send), patience)
        except (asyncio.CancelledError, OSError):
            if not gone.done() and not patience.ended and sending.cancelling():
                raise  # not the client: the server ends
        finally:
            gone.cancel()
            patience.close()
            await self._frames.aclose()
            await self._held.aclose()

    async def _send_all(self, send: Send, patience: _Patience) -> None:
        try:
            async for chunk in self._frames:
                if chunk:
                    patience.begin()
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    patience.end()
        except Exception as error:
            if isinstance(error, OSError):
                raise
            patience.begin()
            body = frame(api_error(error, self._request_id).body())
            await send({"type": "http.response.body", "body": body, "more_body": True})
        patience.begin()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Patience:
    """Cancels a task when one of its writes takes longer than some seconds, by up to a quarter of them. A timer looks
    now and then, as one for each write would take longer than the writes."""

    def __init__(self, seconds: float, task: asyncio.Task[Any]) -> None:
        self._seconds, self._task = seconds, task
        self._loop = task.get_loop()
        self._since: float | None = None
        self.ended = False
        """It was cancelled."""
        self._timer = self._loop.call_later(seconds / 4, self._look)

    def begin(self) -> None:
        """A write begins."""
        self._since = self._loop.time()

    def end(self) -> None:
        self._since = None

    def _look(self) -> None:
        if self._since is not None and self._loop.time() - self._since >= self._seconds:
            self.ended = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds / 4, self._look)

    def close(self) -> None:
        self._timer.cancel()


async def _when_gone(receive: Receive, then: Callable[[], object]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    then()


async def while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client goes away: then `ClientGone` is raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_when_gone(request.receive, task.cancel))
    try:
        return await task
    except asyncio.CancelledError:
        if gone.done() and not gone.cancelled():
            raise ClientGone from None
        task.cancel()
        raise
    finally:
        gone.cancel()


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""
