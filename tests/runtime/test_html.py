"""What a notebook shows of outputs and engine statistics: complete, well-formed, and never markup of the model's."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from octavo import LLM, CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from octavo.engine.contract import EngineStats
from octavo.html import LONGEST_PROMPT

HOSTILE = '<script>alert(1)</script> <img src=x onerror="alert(2)"> </pre></div> &lt; $x$ \'"\n  two'


class Page(HTMLParser):
    """Reads HTML strictly: every tag is closed in order, only `div`, `span` and `pre` appear."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {"div": [], "span": [], "pre": []}
        self.styles: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, "not every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.text, f"<{tag}> has no place here"
        assert {name for name, _ in attrs} <= {"style", "role", "aria-label"}
        self.styles += [value for name, value in attrs if name == "style" and value]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.open[-1]].append(data)

    @property
    def all(self) -> str:
        return " ".join(self.text["div"])


def request(prompt: str | None = "Why?", *texts: str, finished: bool = True) -> RequestOutput:
    metrics = RequestMetrics(
        queue_time=0.001, first_token_time=0.05, last_token_time=0.15, prompt_tokens=7, cached_tokens=4,
        output_tokens=11, preemptions=1,
    )  # fmt: skip
    outputs = [CompletionOutput(i, text, [1, 2, 3], finish_reason="length") for i, text in enumerate(texts)]
    return RequestOutput("octavo-1", prompt, [1] * 7, outputs, finished, metrics)


@pytest.mark.parametrize("hostile", [HOSTILE, "", "ゑ 🌊 \x00\x1b[31m \u202e"])
def test_text_of_a_model_is_never_markup(hostile: str) -> None:
    page = Page(request(hostile, hostile, hostile)._repr_html_())
    assert page.text["pre"] == [text for text in [hostile] * 3 if text]
    assert Page(CompletionOutput(0, hostile)._repr_html_()).text["pre"] == ([hostile] if hostile else [])


def test_a_stop_string_is_escaped_too() -> None:
    output = CompletionOutput(0, "x", [1], finish_reason="stop", stop_reason="<b>")
    assert "ended by stop ('<b>')" in Page(output._repr_html_()).all


def test_a_request_shows_its_outputs_counts_and_times() -> None:
    page = Page(request("Why?", "Because.", "So.")._repr_html_())
    assert page.text["pre"] == ["Why?", "Because.", "So."]
    for fact in ("output 0", "output 1", "3 tokens", "ended by length", "7 prompt tokens (4 cached)",
                 "first token after 50 ms", "then 100 tokens/s", "1 preemption"):  # fmt: skip
        assert fact in page.all, fact
    assert "not finished" not in page.all
    assert "not finished" in Page(request("Why?", "Be", finished=False)._repr_html_()).all


def test_what_is_not_known_is_left_out() -> None:
    empty = RequestOutput("octavo-1", None, [1, 2], [CompletionOutput(0)], False, RequestMetrics())
    page = Page(empty._repr_html_())
    assert page.text["pre"] == ["(2 token ids)"]
    assert "None" not in page.all
    assert "tokens/s" not in page.all


def test_a_long_prompt_is_cut_and_an_answer_is_not() -> None:
    page = Page(request("a" * 5000 + "z", "b" * 5000)._repr_html_())
    prompt, answer = page.text["pre"]
    assert len(prompt) < LONGEST_PROMPT + 10
    assert prompt.startswith("aaa")
    assert prompt.endswith("z")
    assert len(answer) == 5000


def test_the_bar_of_an_engine_is_as_wide_as_its_blocks() -> None:
    stats = EngineStats(3, 2, 200, 50, 30, 120, 4, 1000, 17)
    page = Page(stats._repr_html_())
    widths = [float(width) for style in page.styles for width in re.findall(r"^width:([\d.]+)%", style)]
    assert widths == [25.0, 15.0, 60.0]
    for fact in ("200 blocks", "50 used", "30 cached", "120 free", "3 running", "2 waiting", "1000 steps",
                 "largest batch 17", "4 preemptions"):  # fmt: skip
        assert fact in page.all, fact


def test_an_engine_without_blocks_has_no_bar() -> None:
    page = Page(EngineStats(1, 0, 0, 0, 0, 0, 0, 5, 2)._repr_html_())
    assert "KV cache" not in page.all
    assert "5 steps" in page.all


def test_no_colour_of_text_is_fixed() -> None:
    """Text inherits the notebook's colour, so it is readable in the light and in the dark."""
    for html in (request("Why?", "So.")._repr_html_(), EngineStats(3, 2, 200, 50, 30, 120, 4, 9, 1)._repr_html_()):
        colours = [c for style in Page(html).styles for c in re.findall(r"(?:^|;)color:([^;]+)", style)]
        assert set(colours) <= {"inherit"}


def test_a_real_engine_shows_itself(tiny_model: Path) -> None:
    with LLM(str(tiny_model)) as llm:
        output = llm.generate("Hello", SamplingParams(n=2, max_tokens=3, ignore_eos=True, logprobs=1))[0]
        page = Page(output._repr_html_())
        assert page.all.count("· 3 tokens ·") == 2
        assert "log-probability -" in page.all
        stats = llm.stats()
        assert f"{stats.blocks_total} blocks" in Page(stats._repr_html_()).all


def test_html_is_only_imported_where_it_is_shown() -> None:
    code = "import sys, octavo; octavo.RequestOutput, octavo.LLM; assert 'octavo.html' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
