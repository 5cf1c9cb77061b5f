"""A client of streams that costs little, so that a thousand of them do not measure themselves: plain sockets, no
parser. Used by the tests of load."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Streamed:
    """What became of one stream. Times by `time.monotonic()`."""

    began: float
    status: int = 0
    headers: bytes = b""
    arrivals: list[float] = field(default_factory=list)
    """Of each read that brought an event."""
    done: bool = False
    ended: float = 0.0
    body: bytes = b""

    @property
    def first(self) -> float:
        """Seconds until the first event."""
        return self.arrivals[0] - self.began

    @property
    def longest_pause(self) -> float:
        """Seconds between two events."""
        return max((b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0.0)


async def post(url: str, path: str, body: dict[str, Any], *, keep: bool = False) -> Streamed:
    """Post and read to the end of the answer. `keep`: its body too."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    found = Streamed(time.monotonic())
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)
        found.headers = await reader.readuntil(b"\r\n\r\n")
        found.status = int(found.headers.split(b" ", 2)[1])
        tail = b""
        while chunk := await reader.read(65536):
            if b"data: {" in chunk:
                found.arrivals.append(time.monotonic())
            if keep:
                found.body += chunk
            tail = (tail + chunk)[-64:]
        found.done = b"data: [DONE]" in tail
        found.ended = time.monotonic()
    finally:
        writer.close()
    return found
