"""What is served and how it is: `/v1/models`, `/health`, `/ready`, `/metrics`, `/version`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from octavo import __version__
from octavo.server.call import Call
from octavo.server.metrics import CONTENT_TYPE


async def models(request: Request) -> Response:
    """Every name that `model` may have."""
    return JSONResponse({"object": "list", "data": Call(request).server.models.listing()})


async def model(request: Request) -> Response:
    """One of them."""
    return JSONResponse(Call(request).server.models.card(request.path_params["name"]))


async def health(request: Request) -> Response:
    """The process answers. The only path that never needs a key."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200: requests are taken and answered now. 503: models are being loaded, an engine is down, or the server ends."""
    server = Call(request).server
    if server.draining:
        return JSONResponse({"status": "ending"}, 503)
    if not server.models.ready(server.wanted):
        return JSONResponse({"status": "loading"}, 503)
    return JSONResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    server = Call(request).server
    return Response(await server.observer.page(server.models.loaded()), media_type=CONTENT_TYPE)


async def version(request: Request) -> Response:
    """Of Octavo."""
    return JSONResponse({"version": __version__})
