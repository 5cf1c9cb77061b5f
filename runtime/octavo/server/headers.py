"""The HTTP protocol of uvicorn with a bound on the head of a request, and on the time that it may take."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10
"""Bytes of a request's line and headers."""
HEAD_SECONDS = 15.0
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\nConnection: close\r\n"
_BODY = (
    b'{"error": {"message": "the headers are too long", "type": "invalid_request_error", "param": null, "code": null}}'
)


class BoundedHeaders(HttpToolsProtocol):
    """httptools has no bound of its own. Memory and time of a head that never ends are the server's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0
        """Bytes of a head that is not complete."""
        self._in_head = True
        self._deadline: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while self._in_head and data:
            if self._deadline is None:
                self._deadline = self.loop.call_later(HEAD_SECONDS, self._too_slow)
            room = MAX_HEAD - self._head
            if room <= 0:
                return self._refuse()
            part, data = data[:room], data[room:]
            self._head += len(part)
            super().data_received(part)
            if self.transport.is_closing():  # it was no HTTP
                return
        if data:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        self._in_head, self._head = False, 0
        self._stop_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head = True, 0
        super().on_message_complete()

    def _refuse(self) -> None:
        self.transport.write(_TOO_LARGE + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY)
        self.transport.close()

    def _too_slow(self) -> None:
        self._deadline = None
        if self._in_head:
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
