"""`octavo translate`: a text into another language, for people and for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli.generate import print_json, read_text
from octavo.cli.options import DEFAULT, Debug, Device, Dtype, Json, Model, Revision, open_llm
from octavo.cli.screen import write


def translate(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text; - reads it from standard input.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", metavar="LANGUAGE", help="Into this language: a name or a code.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", "-s", metavar="LANGUAGE", help="From this language.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the text from this file.")
    ] = None,
    as_json: Json = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", metavar="N", help="Most tokens of a sentence.")
    ] = None,
    model: Model = DEFAULT,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights, as tensors only, where there are no others.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Translate a text and leave.

    Blanks and line ends stay as they are, and each sentence is written as soon as it is done:

      octavo translate "Good morning." --target French --model facebook/nllb-200-distilled-600M --allow-pickle

      cat letter.txt | octavo translate --source en --target de

    Without a translation model the chat model does it as well as it can. --json prints one object with the text and
    its sentences. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C.
    """
    whole = read_text(text, file, "text", keep_end=True)
    told: dict[str, Any] = {"source": source, "target": target, "max_tokens": max_tokens}
    settings = {"revision": revision, "device": device, "dtype": dtype, "allow_pickle": allow_pickle}
    with open_llm(model, **settings) as llm:
        if not as_json:
            for piece in llm.translate(whole, stream=True, **told):
                write(piece)
            write("" if whole.endswith("\n") else "\n")
            return
        (output,) = llm.translate(whole, **told)
    print_json({
        "model": model, "text": output.text, "truncated": output.truncated,
        "sentences": [
            {"text": sentence.text, "finish_reason": sentence.outputs[0].finish_reason} for sentence in output.sentences
        ],
    })  # fmt: skip
