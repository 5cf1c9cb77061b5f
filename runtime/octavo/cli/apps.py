"""`octavo app chat` and `octavo app translate`: starts an app's page. The apps are a floor above; they are imported
here only when one is wanted, and they need the extra `apps`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from octavo.cli.options import (
    DEFAULT,
    Debug,
    Device,
    Dtype,
    MaxModelLen,
    Model,
    Quantization,
    Revision,
    UsageProblem,
    paragraphs,
)
from octavo.errors import ConfigError

apps = typer.Typer(no_args_is_help=True, help="Start an app in the browser.")

_PAGE = "Page"
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS", rich_help_panel=_PAGE, help="Listen here; 0.0.0.0 lets other machines use the app."
    ),
]
Port = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=_PAGE, min=1, max=65535, help="By default a free one from 7860."),
]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", rich_help_panel=_PAGE, help="Open the page.")]
LOOPBACK = "127.0.0.1"


def chat(
    model: Model = DEFAULT,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    max_model_len: MaxModelLen = None,
    host: Host = LOOPBACK,
    port: Port = None,
    browser: Browser = True,
    debug: Debug = False,
) -> None:
    """Talk to a model in the browser.

    The page works without a network: nothing is sent to anyone. Conversations are kept by the browser. Several tabs
    are answered in one batch.
    """
    _serve("chat_blocks", model, host, port, browser, revision, device, dtype, quantization, max_model_len)


def translate(
    model: Model = DEFAULT,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    max_model_len: MaxModelLen = None,
    host: Host = LOOPBACK,
    port: Port = None,
    browser: Browser = True,
    debug: Debug = False,
) -> None:
    """Translate texts and files in the browser.

    Files (.txt, .md, .srt, .docx) keep their layout. The page works without a network: nothing is sent to anyone.
    """
    _serve("translate_blocks", model, host, port, browser, revision, device, dtype, quantization, max_model_len)


for _command in (chat, translate):
    apps.command(help=paragraphs(_command.__doc__))(_command)


def _serve(
    blocks: str, model: str, host: str, port: int | None, browser: bool, revision: str | None, device: str, dtype: str,
    quantization: str | None, max_model_len: int | None,
) -> None:  # fmt: skip
    if find_spec("gradio") is None:
        raise UsageProblem("the apps need Gradio: pip install 'octavo[apps]'")
    given = {
        "revision": revision, "device": device, "dtype": dtype, "quantization": quantization,
        "max_model_len": max_model_len,
    }  # fmt: skip
    floor: Any = import_module("octavo_apps")
    try:
        page = getattr(floor, blocks)(model, **{name: value for name, value in given.items() if value is not None})
        floor.serve(page, host=host, port=port, browser=browser)
    except ConfigError as error:
        raise UsageProblem(str(error)) from error
