"""Who may ask: with keys set, every path but `/health` wants one. The outermost layer of the app.

Also what keeps one key's prompts from another's: the prefix cache is salted by key, as times to the first token would
tell who asked what before (CVE-2025-46570)."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.server.errors import ApiError

OPEN = "/health"


class KeyCheck:
    """Middleware: 401 without a key that is known. Sets `state.salt` of a request."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [(key.encode(), _salt(key)) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        salt = self._salt_of(Headers(scope=scope).get("authorization", "")) if self._keys else ""
        if salt is None and scope["path"] != OPEN:
            error = ApiError(
                401, "give an API key of this server: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
            return await error.response()(scope, receive, send)
        scope.setdefault("state", {})["salt"] = salt or ""
        return await self._app(scope, receive, send)

    def _salt_of(self, header: str) -> str | None:
        """None: no key that is known. All are compared, each in constant time (CVE-2025-59425)."""
        scheme, _, key = header.partition(" ")
        given = key.strip().encode("utf-8", "replace")
        found = None
        for known, salt in self._keys:
            if hmac.compare_digest(given, known):
                found = salt
        return found if scheme.lower() == "bearer" else None


def _salt(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=16, person=b"octavo-salt").hexdigest()
