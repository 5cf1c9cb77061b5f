"""The client of `benchmarks/server.py`, a process of its own: closed loops of streamed requests over plain sockets. It
counts events and does not read them, so that it costs a fraction of what the server does.

    python benchmarks/server_client.py URL MODEL '{"streams": 64, ...}'

Prints the figures of `server_load.Figures` as a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from server_load import Figures, Load, Request, Stream

EVENT = b"data: {"
END = b"\r\n0\r\n\r\n"
_MADE = re.compile(rb'"completion_tokens":(\d+)')


class Reader(asyncio.Protocol):
    """One connection that is kept; `ask` sends a request on it and waits for the end of its answer."""

    def __init__(self, url: str, model: str) -> None:
        self._host, self._model = urlsplit(url).netloc, model
        self._transport: Any = None
        self._stream = Stream()
        self._in_head = True
        self._tail = b""
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(ConnectionError(f"the server closed a connection: {error}, {self._tail!r}"))

    async def ask(self, request: Request) -> Stream:
        """Raises `AssertionError` for an answer that is not whole."""
        body: dict[str, Any] = {
            "model": self._model, "stream": True, "stream_options": {"include_usage": True}, **request.sampling,
        }  # fmt: skip
        body |= {"messages": request.messages} if request.chat else {"prompt": request.text}
        path = "/v1/chat/completions" if request.chat else "/v1/completions"
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._ended = asyncio.get_running_loop().create_future()
        self._in_head, self._tail = True, b""
        self._stream = Stream()
        self._transport.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        await self._ended
        found = _MADE.findall(self._tail)
        assert found, f"a stream broke off: {self._tail!r}"
        assert b"data: [DONE]" in self._tail, f"a stream broke off: {self._tail!r}"
        # the event with the usage is no text, nor is the first one of a chat, which has the role
        self._stream.arrivals = self._stream.arrivals[request.chat : -1]
        self._stream.tokens = int(found[-1])
        assert self._stream.tokens == request.max_tokens, "an output has another length than was asked for"
        return self._stream

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        seen = len(self._tail)
        known = self._tail + data
        if self._in_head:
            end = known.find(b"\r\n\r\n")
            if end < 0:
                self._tail = known
                return
            assert known.startswith(b"HTTP/1.1 200"), known
            self._in_head, known, seen = False, known[end + 2 :], 0
        # a mark may have been cut between two reads
        events = known.count(EVENT, max(seen - len(EVENT) + 1, 0))
        self._stream.arrivals.extend([now] * events)
        if known.endswith(END):
            assert self._ended is not None
            self._tail = known
            self._ended.set_result(None)
        else:
            self._tail = known[-1024:]


async def run(url: str, model: str, load: Load) -> Figures:
    """All streams, side by side."""
    loop = asyncio.get_running_loop()
    where = urlsplit(url)
    readers = []
    for _ in range(load.streams):
        _, reader = await loop.create_connection(lambda: Reader(url, model), where.hostname, where.port)
        readers.append(reader)
    waiting = iter(range(load.requests))
    streams: list[Stream] = []

    async def one_after_the_other(reader: Reader) -> None:
        for number in waiting:
            streams.append(await reader.ask(load.request(number)))

    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*map(one_after_the_other, readers))
    seconds = time.perf_counter() - began
    return Figures.of(streams, seconds, time.process_time() - cpu)


def main() -> None:
    url, model, load = sys.argv[1:]
    figures = asyncio.run(run(url, model, Load(**json.loads(load))))
    print(json.dumps(figures.record()))


if __name__ == "__main__":
    main()
