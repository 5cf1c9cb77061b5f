"""Serves an app's page: on this machine alone unless a host is named, never by a public link, and so that no page can
reach out. Called by `octavo app`, by tests, and by whoever imports the blocks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import gradio as gr
from octavo.errors import ConfigError
from starlette.middleware import Middleware

from octavo_apps.look import CSS, theme

LOOPBACK = "127.0.0.1"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; object-src 'none'; base-uri 'self'"
)
"""The browser refuses any request to another host, whatever gets into the page. Gradio's own scripts stand inline."""
MAX_UPLOAD = "20mb"

_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]


class _Policy:
    """Adds the policy to every answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: _Send) -> None:
        async def with_policy(message: _Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)


def serve(
    blocks: gr.Blocks, *, host: str = LOOPBACK, port: int | None = None, browser: bool = False, block: bool = True,
) -> str:  # fmt: skip
    """Start the server and return the page's address.

    Args:
        host: the address to listen on; another than loopback lets other machines use the app.
        port: None takes the first free one from 7860.
        browser: open the page in the user's browser.
        block: return when the server ends (Ctrl-C), not at once.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, inbrowser=browser, share=False, prevent_thread_lock=True, quiet=True,
            theme=theme(), css_paths=CSS, footer_links=[], show_error=False, max_file_size=MAX_UPLOAD,
            enable_monitoring=False, ssr_mode=False, app_kwargs={"middleware": [Middleware(_Policy)]},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port or 7860}: {error}. Choose another --port", "port") from error
    if block:
        print(f"The app runs at {address} (Ctrl-C ends it).", flush=True)
        blocks.block_thread()
    return str(address)
