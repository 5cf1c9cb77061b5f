"""Progress on the terminal, by rich: for downloads, loading and batches. Nothing is shown where stderr is no
terminal."""

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
    """Bars for what happens while a model starts: one for each label. None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        console=Console(stderr=True), transient=True,
    ) as bar:  # fmt: skip
        tasks: dict[str, TaskID] = {}

        def progress(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done, total=total)

        yield progress
