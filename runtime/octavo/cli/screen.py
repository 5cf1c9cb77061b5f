"""What the commands write: a model's text as it comes, sizes, and the line of figures after an answer."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.outputs import RequestMetrics

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console(*, stderr: bool = False) -> Console:
    """A rich console: no guessing at what numbers mean; where the stream is no terminal, no colours and no wrapping."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 400
    return Console(stderr=stderr, highlight=False, width=width)


def write(text: str) -> None:
    """A model's text to stdout at once. A terminal gets no control characters: a model must not drive it."""
    sys.stdout.write(_CONTROL.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def size(count: float) -> str:
    """Bytes for people: `93.8 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate(metrics: RequestMetrics) -> float | None:
    """Tokens per second after the first token."""
    return 1 / metrics.time_per_token if metrics.time_per_token else None


def figures(metrics: RequestMetrics) -> str:
    """`31 tokens, first after 0.12 s, then 45.2 tokens/s`."""
    parts = [f"{metrics.output_tokens} tokens"]
    if metrics.first_token_time is not None:
        parts.append(f"first after {metrics.first_token_time:.2f} s")
    speed = rate(metrics)
    if speed is not None:
        parts.append(f"then {speed:.1f} tokens/s")
    if metrics.cached_tokens:
        parts.append(f"{metrics.cached_tokens} of {metrics.prompt_tokens} prompt tokens from the cache")
    return ", ".join(parts)
