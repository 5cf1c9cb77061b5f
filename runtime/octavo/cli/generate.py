"""`octavo generate`: one prompt, one answer, for people and for scripts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli.options import (
    DEFAULT,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
    Beams,
    Debug,
    Device,
    Dtype,
    EarlyStopping,
    Json,
    LengthPenalty,
    MaxModelLen,
    MaxTokens,
    MinP,
    Model,
    NoRepeatNgramSize,
    Quantization,
    Revision,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    UsageProblem,
    open_llm,
    sampling,
    search,
)
from octavo.cli.screen import console, figures, rate, write
from octavo.outputs import RequestOutput


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the prompt from this file.")
    ] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Write tokens as they come (the default for text).")
    ] = None,
    as_json: Json = False,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    top_p: TopP = DEFAULT_TOP_P,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    no_repeat_ngram_size: NoRepeatNgramSize = 0,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    early_stopping: EarlyStopping = None,
    model: Model = DEFAULT,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    max_model_len: MaxModelLen = None,
    debug: Debug = False,
) -> None:
    """Answer one prompt and leave.

    The answer goes to standard output and everything else to standard error, so it can be piped:

      octavo generate "Name three rivers."

      git diff | octavo generate --system "Summarise this change." --temperature 0

      octavo generate --raw "Once upon a time" --max-tokens 50 --seed 7 --json

      octavo generate "Translate into French: good morning" --beams 4 --max-tokens 40

    --json prints one object with the text, the finish reason, token counts and timings; with --stream, a line for each
    piece before it. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C.
    """
    text = read_text(prompt, file, "prompt")
    if raw and system is not None:
        raise UsageProblem("--system needs the chat template: leave out --raw")
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    params = sampling(
        max_tokens=max_tokens, stop=stop, no_repeat_ngram_size=no_repeat_ngram_size,
        **(drawing | search(context, beams, length_penalty, early_stopping)),
    )  # fmt: skip
    settings = {
        "revision": revision, "device": device, "dtype": dtype, "quantization": quantization,
        "max_model_len": max_model_len,
    }  # fmt: skip
    as_it_comes = (not as_json) if stream is None else stream
    with open_llm(model, **settings) as llm:
        if raw:
            pieces = llm.generate(text, params, stream=True)
        else:
            messages = [{"role": "system", "content": system}] if system is not None else []
            pieces = llm.chat([*messages, {"role": "user", "content": text}], params, stream=True)
        try:
            for piece in pieces:
                if as_it_comes and as_json:
                    print_json({"piece": piece.text, "token_ids": piece.token_ids})
                elif as_it_comes:
                    write(piece.text)
        except KeyboardInterrupt:
            pieces.close()
            if as_it_comes and not as_json:
                write("\n")
            raise
        output = pieces.output
    if as_json:
        print_json(_report(output, model))
        return
    write("\n" if as_it_comes else output.text + "\n")
    if sys.stdout.isatty() and sys.stderr.isatty():
        console(stderr=True).print(figures(output.metrics), style="dim")


def read_text(given: str | None, file: Path | None, what: str, *, keep_end: bool = False) -> str:
    """The prompt, or another `what`, from wherever it comes. `keep_end`: with the line end that stands at its end."""
    if given is not None and file is not None:
        raise UsageProblem(f"give the {what} as an argument or with --file, not both")
    if given is not None and given != "-":
        found, place = given, f"the {what}"
    else:
        place = str(file) if file is not None else "standard input"
        try:
            if file is not None:
                data = file.expanduser().read_bytes()
            elif given == "-" or not sys.stdin.isatty():
                data = sys.stdin.buffer.read()
            else:
                raise UsageProblem(f"there is no {what}: give it as an argument, with --file, or on standard input")
            found = data.decode("utf-8") if keep_end else data.decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageProblem(f"{place} is not text in UTF-8 (byte {error.start})") from error
        except OSError as error:
            raise UsageProblem(f"{place} cannot be read: {error.strerror}") from error
    if not found.strip():
        raise UsageProblem(f"{place} is empty: say what to answer" if what == "prompt" else f"{place} is empty")
    return found


def _report(output: RequestOutput, model: str) -> dict[str, Any]:
    metrics, answer = output.metrics, output.outputs[0]
    return {
        "model": model,
        "prompt": output.prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": metrics.cached_tokens,
            "completion_tokens": len(answer.token_ids),
        },
        "timing": {
            "time_to_first_token": metrics.first_token_time,
            "seconds": metrics.last_token_time,
            "tokens_per_second": rate(metrics),
        },
    }


def print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
