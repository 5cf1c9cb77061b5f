"""`octavo demo`: the first thing a newcomer runs (`make demo` does). One question, the answer as it comes, figures, and
where to go next."""

from __future__ import annotations

from octavo.cli.options import DEFAULT, Debug, Model, open_llm, sampling
from octavo.cli.screen import console, rate, write

QUESTION = "Explain in two sentences why the sky is blue."

NEXT = """\
[bold]Where to go next[/bold]
  [cyan]octavo chat[/cyan]               talk to it; /help lists the commands
  [cyan]octavo generate "Hello!"[/cyan]  one answer, for scripts: pipes, --json
  [cyan]octavo bench[/cyan]              how fast this machine is, and how fast it could be
  [cyan]octavo models[/cyan]             what is on this machine; pull fetches more
  [cyan]octavo chat -m MODEL[/cyan]      a folder, a .gguf file, or a Hugging Face id
  [cyan]README.md[/cyan]                 the same from Python, in five lines
"""


def demo(model: Model = DEFAULT, debug: Debug = False) -> None:
    """Ask the default model one question, and show how fast it answered."""
    out = console()
    with open_llm(model) as llm:
        engine = llm.engine
        limits = engine.limits
        out.print(
            f"[bold]{model}[/bold] on {limits.device}, {limits.weights}, ready in {engine.seconds_to_ready:.1f} s, "
            f"a KV cache of {(limits.num_blocks - 1) * limits.block_size} tokens\n"
        )
        out.print(f"[bold cyan]>[/bold cyan] {QUESTION}\n")
        params = sampling(temperature=0, max_tokens=160)
        pieces = llm.chat([{"role": "user", "content": QUESTION}], params, stream=True)
        with pieces:
            for piece in pieces:
                write(piece.text)
        metrics = pieces.output.metrics
    speed = rate(metrics)
    out.print("\n")
    out.print(f"  time to first token   [bold green]{metrics.first_token_time or 0:.2f} s[/bold green]")
    if speed is not None:
        out.print(f"  tokens per second     [bold green]{speed:.1f}[/bold green]")
    out.print(f"  tokens                {metrics.prompt_tokens} in, {metrics.output_tokens} out\n")
    out.print(NEXT, end="")
