"""Outputs and engine statistics as HTML, for notebooks. Called by `_repr_html_` of `outputs` and `engine.contract`.

No style sheet and no script: colours that are readable on white and on black, and inherit where they can. Whatever a
model or a user wrote is escaped, and stands in `<pre>`, where notebooks do not look for formulas between dollar signs.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.engine.contract import EngineStats
    from octavo.outputs import CompletionOutput, RequestMetrics, RequestOutput

LONGEST_PROMPT = 400
"""Characters of a prompt that are shown: its beginning and its end."""
USED, CACHED, FREE = "#3b82c4", "#d18f2c", "rgba(128,128,128,.25)"
_BOX = "max-width:60em;border:1px solid rgba(128,128,128,.35);border-radius:6px;padding:.5em .8em;margin:.3em 0"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font:inherit;color:inherit;background:none;margin:0;padding:0"
_SMALL = "font-size:85%;opacity:.75"


def request_html(output: RequestOutput) -> str:
    """A box: the prompt, every output, a line of counts and times."""
    prompt = f"({_count(len(output.prompt_token_ids), 'token id')})" if output.prompt is None else output.prompt
    parts = [_text(_shortened(prompt), f"{_TEXT};opacity:.7"), *map(_completion, output.outputs)]
    state = [] if output.finished else ["not finished"]
    return _box(*parts, _line([*state, *_measured(output.metrics)]))


def completion_html(output: CompletionOutput) -> str:
    """A box: the text, and how it ended."""
    return _box(_completion(output))


def stats_html(stats: EngineStats) -> str:
    """A box: who holds the blocks of the KV cache, as a bar; sequences; counts since the engine started."""
    facts = [f"{stats.running} running", f"{stats.waiting} waiting", _count(stats.steps, "step")]
    facts += [f"largest batch {stats.largest_batch}", _count(stats.preemptions, "preemption")]
    return _box(_blocks(stats) if stats.blocks_total else "", _line(facts))


def _blocks(stats: EngineStats) -> str:
    shares = (
        ("used", stats.blocks_used, USED), ("cached", stats.blocks_cached, CACHED), ("free", stats.blocks_free, FREE),
    )  # fmt: skip
    bar = "".join(
        f'<div style="width:{100 * blocks / stats.blocks_total:.2f}%;background:{colour}"></div>'
        for _, blocks, colour in shares
    )
    legend = " &nbsp; ".join(
        f'<span style="display:inline-block;width:.7em;height:.7em;border-radius:2px;background:{colour}"></span> '
        f"{blocks} {name}"
        for name, blocks, colour in shares
    )
    label = ", ".join(f"{blocks} {name}" for name, blocks, _ in shares)
    return (
        f"<div>KV cache: {_count(stats.blocks_total, 'block')}</div>"
        f'<div role="img" aria-label="{label}" style="display:flex;height:.9em;border-radius:3px;overflow:hidden;'
        f'margin:.3em 0">{bar}</div>'
        f'<div style="{_SMALL}">{legend}</div>'
    )


def _completion(output: CompletionOutput) -> str:
    facts = [f"output {output.index}", _count(len(output.token_ids), "token")]
    if output.finish_reason is not None:
        reason = "" if output.stop_reason is None else f" ({output.stop_reason!r})"
        facts.append(f"ended by {output.finish_reason}{reason}")
    if output.cumulative_logprob is not None:
        facts.append(f"log-probability {output.cumulative_logprob:.2f}")
    return _text(output.text, _TEXT) + _line(facts)


def _measured(metrics: RequestMetrics) -> list[str]:
    cached = f" ({metrics.cached_tokens} cached)" if metrics.cached_tokens else ""
    facts = [f"{_count(metrics.prompt_tokens, 'prompt token')}{cached}"]
    if metrics.first_token_time is not None:
        facts.append(f"first token after {1e3 * metrics.first_token_time:.0f} ms")
    if metrics.time_per_token:
        facts.append(f"then {1 / metrics.time_per_token:.0f} tokens/s")
    if metrics.preemptions:
        facts.append(_count(metrics.preemptions, "preemption"))
    return facts


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shortened(text: str) -> str:
    half = LONGEST_PROMPT // 2
    return text if len(text) <= LONGEST_PROMPT else f"{text[:half]} … {text[-half:]}"


def _box(*parts: str) -> str:
    return f'<div style="{_BOX}">{"".join(parts)}</div>'


def _text(text: str, style: str) -> str:
    return f'<pre style="{style}">{escape(text)}</pre>'


def _line(facts: list[str]) -> str:
    return f'<div style="{_SMALL}">{escape(" · ".join(facts))}</div>'
