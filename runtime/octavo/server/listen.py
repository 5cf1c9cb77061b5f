"""`serve`: the app on a port, until a signal ends it. Called by `octavo serve`."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import uvicorn

from octavo.errors import ConfigError
from octavo.server.app import create_app
from octavo.server.headers import BoundedHeaders
from octavo.server.lifecycle import DrainingServer
from octavo.server.models import Models, Served
from octavo.server.observe import Observer
from octavo.server.settings import ServerSettings
from octavo.server.tracing import Tracer

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 30


def serve(
    served: Sequence[Served], settings: ServerSettings, *, host: str, port: int, on_demand: bool = False,
    memory: int | None = None, tracer: Tracer | None = None, drain_seconds: float = 30.0,
) -> None:  # fmt: skip
    """Listen until SIGINT or SIGTERM, as `lifecycle` says.

    Args:
        on_demand: load a model when it is first asked for.
        memory: bytes for all models together.
        tracer: takes a span for each request.
        drain_seconds: for running requests to end when a signal has come.

    Raises:
        ConfigError: the port is taken, or two models have one name.
        OctavoError: a model cannot be loaded.
    """
    observer = Observer(tracer)
    models = Models(served, memory=memory)
    app = create_app(models, settings, observer=observer, load=() if on_demand else None)
    listening = _listening(host, port)
    config = uvicorn.Config(
        app, http=BoundedHeaders, ws="none", log_level="warning", access_log=False, server_header=False,
        date_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, backlog=BACKLOG,
    )  # fmt: skip

    def drain() -> None:
        app.state.server.draining = True

    server = DrainingServer(config, drain=drain, busy=lambda: models.busy, drain_seconds=drain_seconds)

    def stop() -> None:
        server.should_exit = True

    app.state.server.when_failed = stop
    names = ", ".join(one.names[0] for one in served)
    print(f"Octavo serves {names} at {_address(host, port)}/v1 (Ctrl-C ends it).", file=sys.stderr, flush=True)
    with listening:
        server.run(sockets=[listening])
    if app.state.failed is not None:
        raise app.state.failed


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --host or --port"
        raise ConfigError(message, "port") from error
    return listening


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
