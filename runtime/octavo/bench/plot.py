"""Draws a sweep as PNG: tokens/s against concurrency beside the limit, and percentiles of the latencies.

The only module that imports matplotlib, which is the extra `bench`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.bench.sweep import Level, Percentiles

MISSING = "--plot needs matplotlib: pip install 'octavo[bench]'"
BLUE, LIGHTER, LIGHTEST, GREY = "#1f5fa8", "#6c9fd4", "#b3cdea", "#707070"


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(levels: Sequence[Level], title: str, file: Path) -> None:
    """Write `file`. Raises `OSError` where that cannot be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system is asked for
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 4.2), layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    work = f"{levels[0].prompt_tokens} tokens in, {levels[0].output_tokens} out"
    figure.suptitle(f"{title}: {work}", fontsize=11)
    speed, first, gap = figure.subplots(1, 3)
    at = [level.concurrency for level in levels]
    _throughput(speed, at, levels)
    _latency(first, at, [level.time_to_first_token for level in levels], "Time to first token, ms")
    _latency(gap, at, [level.inter_token_latency for level in levels], "Time between tokens, ms")
    for axes in (speed, first, gap):
        _style(axes, at)
    figure.savefig(file, format="png", dpi=150)


def _throughput(axes: Any, at: list[int], levels: Sequence[Level]) -> None:
    axes.plot(at, [level.limit for level in levels], "--", color=GREY, linewidth=1.2, label="limit of the machine")
    axes.plot(at, [level.tokens_per_second for level in levels], "o-", color=BLUE, label="measured", markersize=4)
    axes.set_ylabel("Output tokens/s")
    axes.set_ylim(bottom=0)


def _latency(axes: Any, at: list[int], values: list[Percentiles], label: str) -> None:
    """Logarithmic: a token that waits for another request's prompt takes many times as long as the median."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for name, color in (("p99", LIGHTEST), ("p90", LIGHTER), ("p50", BLUE)):
        axes.plot(at, [1e3 * getattr(value, name) for value in values], "o-", color=color, label=name, markersize=4)
    axes.set_ylabel(label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _style(axes: Any, at: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(value) for value in at])
    axes.minorticks_off()
    axes.set_xlabel("Requests at once")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
