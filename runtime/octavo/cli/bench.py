"""`octavo bench`: how fast a model runs on this machine, beside what the machine could do.

The rows are those of `octavo.bench.workloads`, the limits those of `octavo.bench.limits`. Where the full rows would
take long they are scaled down by how fast this machine turns out to be; what was run stands beside each figure.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.bench.workloads import NAMES, READY, ROWS, probe
from octavo.cli.options import (
    DEFAULT,
    Debug,
    Device,
    Dtype,
    Json,
    MaxModelLen,
    Model,
    Quantization,
    Revision,
    UsageProblem,
    open_llm,
)
from octavo.cli.screen import console, size

if TYPE_CHECKING:
    from octavo.bench.run import Result
    from octavo.bench.sweep import Level
    from octavo.llm import LLM

SWEEP = 4
"""Going over concurrency may take so many times as long as a row."""
ABOUT = {
    "tokens/s": "output tokens of all requests over the whole time, prompts included",
    "ms per token": "one request, after its first token",
    "ms": "one request, nothing else running",
    "s": "the whole time",
}


@dataclass(frozen=True, slots=True)
class Report:
    """What `--json` prints; seconds, bytes, operations, tokens per second."""

    model: str
    device: str
    weights: str
    threads: int
    max_model_len: int
    max_num_seqs: int
    rows: list[Result]
    sweep: list[Level] | None
    """One entry for each number of requests at once; with `--plot` only."""
    bandwidth: float
    products_per_second: float
    """Operations, a multiplication and an addition being two."""
    weight_bytes: int
    memory_bytes: int | None
    """Peak resident memory of this process; of the device on a GPU."""


def bench(
    rows: Annotated[
        str, typer.Option(metavar="NAMES", help=f"Which to run, with commas between: {', '.join(NAMES)}.")
    ] = ",".join(NAMES),
    scale: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="Part of the requests and of their lengths, 1 for all. Default: what takes some seconds."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Without --scale: about what a row may take. Default 12, on a GPU 60."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Also go over concurrency, as long as four rows, and draw it."),
    ] = None,
    as_json: Json = False,
    model: Model = DEFAULT,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    load_format: Annotated[
        str, typer.Option(metavar="KIND", help="auto, or dummy: random weights, a folder needs a config.json only.")
    ] = "auto",
    max_model_len: MaxModelLen = None,
    debug: Debug = False,
) -> None:
    """Measure this machine: one stream, batches, first tokens, a shared prefix, memory, and the limit of each.

    Random prompts, temperature 0.6, answers of a fixed length. Takes a minute or two with the default model on a CPU.
    Close other programs first: on a busy machine it measures the others too.
    """
    wanted = _wanted(rows)
    if scale is not None and not 0 < scale <= 1:
        raise UsageProblem(f"scale must be above 0 and at most 1, not {scale:g}")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageProblem(f"seconds must be above 0, not {seconds:g}")
    if plot is not None:
        _check_plot(plot)
    settings = {
        "revision": revision, "device": device, "dtype": dtype, "quantization": quantization,
        "load_format": load_format, "max_model_len": max_model_len,
    }  # fmt: skip
    with _opened(model, settings) as llm:
        report = measure(llm, model, wanted, scale, seconds, sweep=plot is not None)
    if plot is not None:
        from octavo.bench.plot import draw

        try:
            draw(report.sweep or [], f"{report.model} on {report.device}, {report.weights}", plot)
        except OSError as error:
            raise UsageProblem(f"{plot} cannot be written: {error.strerror or error}") from error
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print(report)


def measure(
    llm: LLM, model: str, rows: list[str], scale: float | None, seconds: float | None, *, sweep: bool
) -> Report:
    """Run everything on an idle `llm`. `scale` None: each row as large as it may be to take `seconds`."""
    import torch

    from octavo.bench.machine import in_process, limit_of, peak_memory
    from octavo.bench.run import ROW_SECONDS, Clock, Result, Timed, beside, scale_for, time_row
    from octavo.bench.sweep import Measured
    from octavo.bench.sweep import sweep as levels

    limits, clock = llm.engine.limits, Clock(llm)
    longest = limits.max_model_len
    if longest < (least := max(len(prompt) + 16 for prompt in probe(clock.vocabulary).prompts)):
        raise UsageProblem(f"the engine holds {longest} tokens; measuring needs at least {least}")
    limit = limit_of(llm.engine)
    clock.warm_up()
    slowness, most = clock.slowness(limit), seconds or ROW_SECONDS[torch.device(limits.device).type]
    timed: list[Timed] = []
    for row in (ROWS[name] for name in ROWS if name in rows):
        with _shown(row.label):
            part = scale or scale_for(row, lambda job: slowness * limit.seconds(job), most, clock.vocabulary, longest)
            timed.append(time_row(clock, row, scale=part))
    measured: list[Measured] = []
    if sweep:
        with _shown("requests at once: 1, 2, 4, ..."):
            measured.extend(levels(llm, seconds=SWEEP * most))
    limit = limit.best(limit_of(llm.engine))  # another program may have been busy the first time
    found = [Result(READY, "ready", "s", llm.engine.seconds_to_ready)] if READY in rows else []
    found += [beside(limit, row, clock.vocabulary) for row in timed]
    # of the engine's thread, not of this one
    threads = in_process(llm.engine).call(lambda core: torch.get_num_threads())
    return Report(
        model, limits.device, limits.weights, threads, longest, limits.max_num_seqs, found,
        [level.beside(limit) for level in measured] if sweep else None,
        limit.machine.bandwidth, limit.machine.products, limits.weight_bytes, peak_memory(torch.device(limits.device)),
    )  # fmt: skip


def _wanted(rows: str) -> list[str]:
    names = [name.strip() for name in rows.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise UsageProblem(f"rows: {name!r} is none of {', '.join(NAMES)}")
    if not names:
        raise UsageProblem(f"rows: name at least one of {', '.join(NAMES)}")
    return names


def _check_plot(file: Path) -> None:
    """What is wrong with `--plot` shows before anything is measured."""
    from octavo.bench.plot import MISSING, available

    if file.suffix.lower() != ".png":
        raise UsageProblem(f"plot writes a PNG: {file} must end in .png")
    if not file.parent.is_dir():
        raise UsageProblem(f"{file} cannot be written: {file.parent} is not a folder")
    if not available():
        raise UsageProblem(MISSING)


@contextmanager
def _opened(model: str, settings: Mapping[str, object]) -> Iterator[LLM]:
    """A model for random weights needs no tokenizer; it is then given one of a word."""
    from octavo.bench.shapes import with_tokenizer

    place = Path(model).expanduser()
    if settings["load_format"] != "dummy" or not place.is_dir():
        with open_llm(model, **settings) as llm:
            yield llm
        return
    with with_tokenizer(place) as folder, open_llm(str(folder), **settings) as llm:
        yield llm


@contextmanager
def _shown(what: str) -> Iterator[None]:
    """Say on a terminal what is being measured."""
    if not sys.stderr.isatty():
        yield
        return
    began = time.monotonic()
    out = console(stderr=True)
    with out.status(what):
        yield
    out.print(f"[dim]{what}: {time.monotonic() - began:.0f} s[/dim]")


def _print(report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    out.print(
        Text.assemble((report.model, "bold"), f" on {report.device}, {report.weights}, {report.threads} threads\n")
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("measured", "limit", "share"):
        table.add_column(column, justify="right")
    table.add_column("")
    table.add_column("size")
    for row in report.rows:
        limit = "" if row.limit is None else _figure(row.limit)
        reached = "" if row.share is None else f"{100 * row.share:.0f}%"
        table.add_row(row.label, _figure(row.value), limit, reached, row.unit, "" if row.limit is None else _size(row))
    out.print(table)
    if report.sweep:
        out.print(_sweep_table(report.sweep))
        if report.sweep[-1].concurrency < report.max_num_seqs:
            out.print(f"[dim]stopped below {report.max_num_seqs} at once, for time[/dim]")
    if report.memory_bytes:
        out.print(f"\nmemory at most {size(report.memory_bytes)}")
    units = "; ".join(f"{unit}: {meaning}" for unit, meaning in ABOUT.items() if unit in {r.unit for r in report.rows})
    out.print(
        f"\n[dim]{units}.\nlimit: weights ({size(report.weight_bytes)}) are read once a step, keys and values of all "
        f"tokens too; this machine reads {size(report.bandwidth)}/s and multiplies "
        f"{report.products_per_second / 1e9:.0f} GOP/s (both measured).\nsize: part of the full row's requests and of "
        "their lengths; --scale 1 runs all.[/dim]"
    )


def _sweep_table(levels: list[Level]) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="")
    first = levels[0]
    table.title = f"\nRequests at once, {first.prompt_tokens} in, {first.output_tokens} out; latencies in ms"
    for column in ("at once", "tokens/s", "limit", "share", "first token p50", "p90", "p99", "next token p50", "p90",
                   "p99"):  # fmt: skip
        table.add_column(column, justify="right")
    for level in levels:
        table.add_row(
            str(level.concurrency), _figure(level.tokens_per_second), _figure(level.limit),
            f"{100 * level.tokens_per_second / level.limit:.0f}%",
            *(
                _figure(1e3 * value)
                for kind in (level.time_to_first_token, level.inter_token_latency)
                for value in (kind.p50, kind.p90, kind.p99)
            ),
        )  # fmt: skip
    return table


def _size(row: Result) -> str:
    whole = 1 / row.scale
    text = "full" if row.scale == 1 else f"1/{whole:.0f}" if abs(whole - round(whole)) < 1e-6 else f"{row.scale:g}"
    return f"{text}, shortened to what the engine holds" if row.shortened else text


def _figure(value: float) -> str:
    """Three digits that count, and none that are missing."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
