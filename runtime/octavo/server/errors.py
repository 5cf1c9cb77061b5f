"""What goes wrong, in HTTP: the one place where an error becomes a status, and the shape that OpenAI's clients read.

No reply holds a path, an address or a trace: an error that is not ours says no more than the id of its request, and the
log says the rest."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from octavo.errors import (
    EngineClosedError,
    OctavoError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    UnsupportedModelError,
)

logger = logging.getLogger("octavo.server")

RETRY_AFTER = 1
"""Seconds after which a client may ask again when the queue was full: a step of any model is shorter."""
MESSAGE_CHARACTERS = 1000
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "invalid_request_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 431: "invalid_request_error", 500: "server_error", 503: "service_unavailable_error",
}  # fmt: skip


class ApiError(Exception):
    """An error as a client sees it. `param` names the field, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message if len(self.message) <= MESSAGE_CHARACTERS else self.message[:MESSAGE_CHARACTERS] + "..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, self.headers)


def refused(message: str, param: str | None = None) -> ApiError:
    """A request that must be changed."""
    return ApiError(400, message, param=param, code="invalid_value" if param else None)


def api_error(error: BaseException, request_id: str = "") -> ApiError:
    """Any error as a client may see it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return refused(_ADDRESS.sub("", str(error)), error.field)  # a template can print an object
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, QueueFullError):
        return ApiError(
            429, "too many requests wait already: try again later", code="queue_full",
            headers={"Retry-After": str(RETRY_AFTER)},
        )  # fmt: skip
    if isinstance(error, EngineClosedError):
        return ApiError(
            503, "the engine of this model is not running", code="engine_closed",
            headers={"Retry-After": str(RETRY_AFTER)},
        )  # fmt: skip
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, RequestFailedError):
        logger.error("request %s failed: %s", request_id, error, exc_info=error)
        return ApiError(500, f"the model failed while it ran request {request_id}", code="request_failed")
    if isinstance(error, UnsupportedModelError | OctavoError):
        logger.error("request %s: %s", request_id, error, exc_info=error)
        return ApiError(500, f"request {request_id} failed: the log of the server says why", code="octavo_error")
    logger.error("request %s: unexpected %s", request_id, type(error).__name__, exc_info=error)
    return ApiError(500, f"request {request_id} failed by an error of the server", code="internal_error")


def _of_http(error: HTTPException) -> ApiError:
    messages = {404: "there is no such path", 405: "this path does not have this method"}
    headers = dict(error.headers or {})
    return ApiError(error.status_code, messages.get(error.status_code, str(error.detail)), headers=headers)


def _of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by the name of its field; of a field with several forms, what is wrong with the
    one that comes nearest. What was sent is not repeated: it may be long."""
    errors = error.errors(include_url=False, include_input=False)
    first = max(errors, key=lambda one: len(one["loc"]))
    *loc, last = first["loc"] or ("",)
    names = [str(part) for part in loc if not (isinstance(part, str) and _is_branch(part))]
    if first["type"] == "extra_forbidden" or not (isinstance(last, str) and _is_branch(last)):
        names.append(str(last))
    if first["type"] == "unsupported_field":
        place = ".".join([*names, str(first["ctx"]["name"])])
        return ApiError(400, f"{place} is not supported: leave it out", param=place, code="unsupported_field")
    place = ".".join(filter(None, names))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {place[:200]!r}", param=place[:200], code="unknown_field")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, param=place or None, code="invalid_value")


def _is_branch(part: str) -> bool:
    """Pydantic's name for one form of several that a field can have: no field of the client's."""
    return not part.isidentifier() or part in ("str", "int", "float", "bool")


async def on_error(request: Request, error: Exception) -> Response:
    """The handler of every kind of error."""
    if isinstance(error, RequestValidationError):
        error = refused("the request is malformed")
    return api_error(error, getattr(request.state, "request_id", "")).response()
