"""One HTTP call that makes text, from the checked body to the response, whatever the endpoint: `respond`.

What differs between endpoints is an `Answer`: the prompts and parameters, and the shape of what comes back."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from octavo.errors import RequestError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.body import read_json
from octavo.server.errors import ApiError
from octavo.server.models import Loaded, Models, Served
from octavo.server.observe import Observer
from octavo.server.run import Run
from octavo.server.settings import ServerSettings
from octavo.server.streams import ClientGone, EventStream, Frames, while_connected

B = TypeVar("B", bound=BaseModel)


class Server:
    """What all endpoints share.

    `wanted`: models that are to be there from the start. `draining`: the server takes its leave, and `/ready` says so.
    `when_failed` is called when a wanted model cannot be loaded.
    """

    def __init__(self, models: Models, settings: ServerSettings, observer: Observer, wanted: Sequence[Served]) -> None:
        self.models, self.settings, self.observer, self.wanted = models, settings, observer, tuple(wanted)
        self.draining = False
        self.when_failed: Callable[[], None] = lambda: None


class Call:
    """One HTTP call."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.server: Server = request.app.state.server
        self.id: str = request.state.request_id
        self.salt: str = request.state.salt

    async def body(self, kind: type[B]) -> B:
        """Raises `ApiError` or `ValidationError`."""
        if self.server.draining:
            raise ApiError(503, "the server is ending", code="ending", headers={"Retry-After": "5"})
        found = kind.model_validate(await read_json(self.request, self.server.settings))
        own = getattr(found, "request_id", None)
        if own:
            self.id = self.request.state.request_id = own
        return found


class Answer(Protocol):
    """How one call of an endpoint is made and answered."""

    prompts: list[dict[str, Any]]
    params: SamplingParams
    special: bool
    """Add BOS as the tokenizer does."""
    size: int
    """Characters that are still to be tokenised."""
    names: dict[str, str]
    """Fields of the engine's errors, with the names that the client knows."""

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]: ...

    def frames(self, run: Run) -> Frames: ...


async def respond(
    call: Call, endpoint: str, model: str | None, stream: bool, priority: int,
    prepare: Callable[[Loaded], Awaitable[Answer]],
) -> Response:  # fmt: skip
    """Load the model if need be, run the requests, send what comes. A client that goes away ends it at any stage."""
    server = call.server
    stack = AsyncExitStack()

    async def start() -> tuple[Answer, Run]:
        loaded = await stack.enter_async_context(server.models.use(model))
        loaded.check_generates()
        answer = await prepare(loaded)
        try:
            if answer.params.structured_outputs is not None:
                await loaded.verdicts.approve(answer.params.structured_outputs)
            watch = server.observer.begin(endpoint, loaded.name, call.id, call.request.headers)
            run = await Run.start(
                loaded.llm, answer.prompts, answer.params, priority=priority, special=answer.special, stream=stream,
                size=answer.size, watch=watch,
            )  # fmt: skip
        except RequestError as error:
            raise RequestError(str(error), answer.names.get(error.field or "", error.field)) from error
        stack.callback(run.close)
        return answer, run

    async def whole() -> dict[str, Any]:
        answer, run = await start()
        return answer.whole(await run.whole())

    try:
        if not stream:
            found = await while_connected(call.request, whole())
            await stack.aclose()
            return JSONResponse(found)
        answer, run = await while_connected(call.request, start())
    except ClientGone:
        await stack.aclose()
        return Response(status_code=499)
    except BaseException:
        await stack.aclose()
        raise
    return EventStream(answer.frames(run), stack, request_id=call.id, write_seconds=server.settings.write_seconds)


def new_id() -> str:
    return secrets.token_hex(12)
