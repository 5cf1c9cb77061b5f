"""`create_app`: the server put together from its parts. Called by `octavo serve` and by tests."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo import __version__
from octavo.errors import OctavoError
from octavo.server import chat, completions, embeddings, info, responses, tokens
from octavo.server.auth import KeyCheck
from octavo.server.call import Server
from octavo.server.errors import ApiError, on_error
from octavo.server.models import Models, Served
from octavo.server.observe import Observer
from octavo.server.protocol.chat import ChatCompletionRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.embeddings import EmbeddingRequest
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from octavo.server.settings import ServerSettings

logger = logging.getLogger("octavo.server")
LOOK_SECONDS = 0.5
Endpoint = Callable[[Request], Awaitable[Response]]

_POSTS: list[tuple[str, Endpoint, type[BaseModel]]] = [
    ("/v1/chat/completions", chat.chat_completions, ChatCompletionRequest),
    ("/v1/completions", completions.completions, CompletionRequest),
    ("/v1/responses", responses.responses, ResponsesRequest),
    ("/v1/embeddings", embeddings.embeddings, EmbeddingRequest),
    ("/tokenize", tokens.tokenize, TokenizeRequest),
    ("/detokenize", tokens.detokenize, DetokenizeRequest),
]
_GETS: list[tuple[str, Endpoint]] = [
    ("/v1/models", info.models),
    ("/v1/models/{name:path}", info.model),
    ("/health", info.health),
    ("/ready", info.ready),
    ("/metrics", info.metrics),
    ("/version", info.version),
]


def create_app(
    models: Models, settings: ServerSettings | None = None, *, observer: Observer | None = None,
    load: tuple[Served, ...] | None = None,
) -> FastAPI:  # fmt: skip
    """The app. `load`: models to load as soon as the server runs; None: all. `/ready` waits for them.

    `app.state.server` is the `Server`; `app.state.failed` the error of a model that could not be loaded at start."""
    settings = settings or ServerSettings()
    server = Server(models, settings, observer or Observer(), models.all if load is None else load)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(app, server))
        try:
            yield
        finally:
            loading.cancel()
            with suppress(asyncio.CancelledError):
                await loading
            await models.close()
            await asyncio.to_thread(server.observer.close)

    app = FastAPI(
        title="Octavo", version=__version__, lifespan=lifespan, redirect_slashes=False,
        docs_url=None, redoc_url=None,  # those pages fetch scripts from other hosts
        middleware=[Middleware(RequestIds, observer=server.observer), Middleware(KeyCheck, keys=settings.api_keys)],
    )  # fmt: skip
    app.state.server, app.state.failed = server, None
    schemas: dict[str, Any] = {}
    for path, endpoint, kind in _POSTS:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**schema.pop("$defs", {}), kind.__name__: schema}
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        extra = {"requestBody": {"required": True, "content": content}}
        app.add_api_route(path, endpoint, methods=["POST"], response_class=Response, openapi_extra=extra)
    for path, endpoint in _GETS:
        app.add_api_route(path, endpoint, methods=["GET"], response_class=Response)
    _describe(app, schemas)
    for error in (OctavoError, ApiError, HTTPException, ValidationError, Exception):
        app.add_exception_handler(error, on_error)
    return app


def _describe(app: FastAPI, schemas: dict[str, Any]) -> None:
    """Bodies in `/openapi.json`: the endpoints read them by themselves, so FastAPI does not know of them."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return found

    app.openapi = openapi  # type: ignore[method-assign]


async def _load(app: FastAPI, server: Server) -> None:
    """Load what is to be there from the start, and look after it. A model that cannot be loaded, or whose engine is
    given up, ends the server: `when_failed`."""
    try:
        for served in server.wanted:
            await server.models.get(served)
        while (given_up := server.models.given_up(server.wanted)) is None:
            await asyncio.sleep(LOOK_SECONDS)
        raise given_up
    except Exception as error:
        app.state.failed = error
        server.when_failed()


class RequestIds:
    """Middleware: every request has an id, which its answer carries as `X-Request-Id`. A client may choose it. What
    became of the request is reported under it."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app, self._observer = app, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        state["request_id"] = secrets.token_hex(12)
        state["send_body"] = send  # for a stream, when its answer has begun: no layer from here on looks at more
        began, status = time.monotonic(), 499  # if there is no reply, the client has gone

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        except Exception:
            status = 500
            raise
        finally:
            del state["send_body"]  # it leads back to the scope
            route = getattr(scope.get("route"), "path", "")
            self._observer.replied(state["request_id"], scope["method"], route, status, began)
