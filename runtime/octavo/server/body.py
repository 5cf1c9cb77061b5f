"""A request's body as JSON: bounded in size, time and depth, and unambiguous. Called by `call`."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from starlette.requests import ClientDisconnect, Request

from octavo.server.errors import ApiError, refused
from octavo.server.settings import ServerSettings

MAX_VALUES = 400_000
"""In one body. Reading takes a microsecond for each, all told, and nothing else runs meanwhile."""
MAX_DEPTH = 200
"""Of nested arrays and objects. No schema of a tool comes near it, and everything behind may recurse."""


async def read_json(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """The object in the body. Raises `ApiError`: 400, 408, 413 or 415."""
    return parse_json(await _read(request, settings))


async def _read(request: Request, settings: ServerSettings) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers ask a server before they send this one from another page
        raise ApiError(415, "send JSON: Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body must not be compressed", code="unsupported_media_type")
    bound = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > bound:
        raise _too_long(bound)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > bound:
                    raise _too_long(bound)
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise refused("the body was cut") from None
    return b"".join(chunks)


def _too_long(bound: int) -> ApiError:
    message = f"the body is longer than {bound} bytes"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def parse_json(data: bytes) -> dict[str, Any]:
    """One JSON object in UTF-8. Raises `ApiError` where readers could disagree about what it says."""
    if _has_many_values(data):
        raise refused(f"the body has more than {MAX_VALUES} values")
    try:
        text = data.decode()
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise refused("the body is not UTF-8") from None
    except RecursionError:
        raise refused("the body is nested too deeply") from None
    except ValueError as error:  # json's messages name places, not contents; an integer of 5000 digits is one too
        raise refused(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise refused("the body must be a JSON object")
    if _deeper_than(found, MAX_DEPTH):
        raise refused(f"the body is nested more than {MAX_DEPTH} deep")
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(found)
    return found


def _has_many_values(data: bytes) -> bool:
    """Found without reading it as JSON: a value but the first stands behind a comma or a bracket."""
    if _marks(data) <= MAX_VALUES:
        return False
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * MAX_VALUES:  # a value and its name have four at most
        return True
    return _marks(b"".join(plain.split(b'"')[::2])) > MAX_VALUES  # those in strings do not count


def _marks(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise refused(f"the name {double[:80]!r} stands twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise refused(f"{name} is not JSON")


def _deeper_than(value: Any, bound: int) -> bool:
    """Whether containers stand in each other more than `bound` times. Level by level: it does not recurse."""
    level = [value]
    for _ in range(bound):
        level = [
            item
            for box in level
            for item in (box.values() if isinstance(box, dict) else box)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _check_surrogates(found: dict[str, Any]) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise refused("the body has half of a surrogate pair, which is no text") from None
