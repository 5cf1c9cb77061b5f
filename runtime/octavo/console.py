"""Progress on the terminal, by rich: for downloads, loading and batches. Nothing is shown where stderr is no
terminal. Called by `LLM.generate` and by the command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from octavo.models.sources import Progress


@contextmanager
def batch_progress(requests: int) -> Iterator[Callable[[int, int], None]]:
    """A bar over the requests of a batch. Yields `advance(requests, tokens)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
    )  # fmt: skip
    began, total = time.monotonic(), 0
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=requests, rate=0.0)

        def advance(done: int, tokens: int) -> None:
            nonlocal total
            total += tokens
            bar.update(task, advance=done, rate=total / max(time.monotonic() - began, 1e-3))

        yield advance


@contextmanager
def loading_progress() -> Iterator[Progress | None]:
    """Bars for what happens while a model starts: one for each label. None where stderr is no terminal.

    "loading" counts tensors; every other label is a download and counts bytes. Until the first of them something moves
    too, because importing torch takes its time.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {"": bar.add_task("starting", total=None, amount="")}
        begun: dict[str, float] = {}

        def progress(label: str, done: int, total: int | None) -> None:
            now = time.monotonic()
            if label not in tasks:
                if "" in tasks:
                    bar.remove_task(tasks.pop(""))
                tasks[label] = bar.add_task(label.replace("[", r"\["), total=total, amount="")
                begun[label] = now
            if label == "loading":
                amount = f"{100 * done / total:.0f}%" if total else ""
            else:
                speed = done / max(now - begun[label], 1e-3)
                of = f" of {decimal(total)}" if total else ""
                amount = f"{decimal(done)}{of}, {decimal(int(speed))}/s"
            bar.update(tasks[label], completed=done, total=total, amount=amount)

        yield progress
