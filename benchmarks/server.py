"""What does the HTTP server cost? `octavo serve` under 1, 16, 64 and 256 streams, beside the engine in process.

    python benchmarks/server.py [--model M | --tiny | --shape DIR] [--rounds 3] [--streams 1 16 64 256] [--out FILE]

The server is the real program; its client is a process of its own (`server_client.py`); the engine in process is an
`AsyncLLM` in a third (`server_engine.py`). All three live through the run. In each round every number of streams is run
on both, one right after the other and in turn the one or the other first, since a machine's speed drifts. The load is
`server_load.Load`. Medians over the rounds count. For each number of streams:

- requests and output tokens a second; milliseconds to the first text and between two texts of a stream, p50 and p99;
- overhead: seconds of the server over seconds in process, of the same round;
- processor seconds of the server's process, of its children (an engine may be one), of the client, and of the process
  beside it: where cores are few the client takes its share, and the processor's time says what the clock cannot;
- microseconds of the main thread for each token: HTTP, in the server; taking the pieces, in process;
- limit: the tokens a second that this machine's memory and products allow with as many rows (`octavo.bench.limits`),
  and for the server the engine in process.

`--tiny` is a model that costs next to nothing, so that all that is seen is the server; `--shape` has random weights of
the shape of DIR/config.json, for a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from server_load import Load

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
NAME = "measured"


class Server:
    """`octavo serve`, asked by a client in a process of its own for each load."""

    name = "server"

    def __init__(self, url: str, pid: int) -> None:
        self._url, self._process = url, psutil.Process(pid)

    def run(self, load: Load) -> dict[str, Any]:
        before = used(self._process)
        command = [sys.executable, str(HERE / "server_client.py"), self._url, NAME, json.dumps(asdict(load))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        cpu = {name: value - before[name] for name, value in used(self._process).items()}
        found = json.loads(done.stdout)
        return found | {"cpu": {**cpu, "client": found.pop("reader_cpu")}}


class InProcess:
    """The engine in a process that takes its pieces itself."""

    name = "in process"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._lines, self._process = process, psutil.Process(process.pid)

    def ask(self, line: str) -> Any:
        assert self._lines.stdin is not None
        assert self._lines.stdout is not None
        self._lines.stdin.write(line + "\n")
        self._lines.stdin.flush()
        answer = self._lines.stdout.readline()
        if not answer:
            raise RuntimeError("the engine in process has ended")
        return json.loads(answer)

    def run(self, load: Load) -> dict[str, Any]:
        before = used(self._process)
        found: dict[str, Any] = self.ask(json.dumps(asdict(load)))
        found["cpu"] = {name: value - before[name] for name, value in used(self._process).items()}
        del found["reader_cpu"]
        return found


def used(process: psutil.Process) -> dict[str, float]:
    """Processor seconds so far."""

    def total(one: psutil.Process) -> float:
        times = one.cpu_times()
        return float(times.user + times.system)

    main = next(thread for thread in process.threads() if thread.id == process.pid)
    return {
        "process": total(process), "children": sum(map(total, process.children(recursive=True))),
        "main thread": main.user_time + main.system_time,
    }  # fmt: skip


@contextmanager
def engine(settings: dict[str, Any], environment: dict[str, str]) -> Iterator[InProcess]:
    command = [sys.executable, str(HERE / "server_engine.py"), json.dumps(settings)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the engine in process did not start")
        yield InProcess(process)
        assert process.stdin is not None
        process.stdin.close()


def requests_for(streams: int, scale: float) -> int:
    """Enough for every stream to come to another one, and for one stream to be no accident."""
    return max(streams, int(scale * max(8, min(3 * streams, streams + 64))))


def measure(given: argparse.Namespace, server: Server, beside: InProcess, report: dict[str, Any]) -> None:
    """Every run goes to the report: its load, its side, its figures. It is kept as it grows."""
    found = report["runs"]
    for side in (server, beside):
        side.run(Load(16, 32, given.tokens, given.words, 0))
    for number in range(1, given.rounds + 1):
        for streams in given.streams:
            load = Load(streams, requests_for(streams, given.scale), given.tokens, given.words, number * 1000 + streams)
            order: list[Server | InProcess] = [server, beside]
            for side in order if number % 2 else order[::-1]:
                machine = os.getloadavg()[0]
                figures = side.run(load)
                found.append({"round": number, "streams": streams, "side": side.name, "loadavg": machine, **figures})
                keep(report, given.out)
                print(
                    f"round {number}, {streams} streams, {side.name}: {figures['tokens_per_second']:.0f} tokens/s "
                    f"(load of the machine {machine:.1f})", file=sys.stderr, flush=True,
                )  # fmt: skip


def keep(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1))


def summary(runs: list[dict[str, Any]], limits: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each number of streams and side: medians, and the overhead of each round."""
    rows = []
    for streams in sorted({run["streams"] for run in runs}):
        pairs: dict[int, dict[str, dict[str, Any]]] = {}
        for run in runs:
            if run["streams"] == streams:
                pairs.setdefault(run["round"], {})[run["side"]] = run
        for side in (Server.name, InProcess.name):
            mine = [pair[side] for pair in pairs.values()]
            row: dict[str, Any] = {"streams": streams, "side": side}
            for name in ("requests_per_second", "tokens_per_second", "first_p50", "first_p99", "gap_p50", "gap_p99"):
                row[name] = statistics.median(run[name] for run in mine)
            row["cpu"] = {name: statistics.median(run["cpu"][name] for run in mine) for name in mine[0]["cpu"]}
            row["seconds"] = statistics.median(run["seconds"] for run in mine)
            row["main_us"] = statistics.median(run["cpu"]["main thread"] / run["tokens"] for run in mine) * 1e6
            row["loadavg"] = statistics.median(run["loadavg"] for run in mine)
            row["limit"] = limits.get(str(min(streams, len(limits))))
            rows.append(row)
        both = [(pair[Server.name], pair[InProcess.name]) for pair in pairs.values()]
        rows[-2]["overheads"] = [mine["seconds"] / other["seconds"] - 1 for mine, other in both]
        rows[-2]["cpu_overheads"] = [
            (mine["cpu"]["process"] + mine["cpu"]["children"]) / other["cpu"]["process"] - 1 for mine, other in both
        ]
    return rows


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):+.1%} ({min(values):+.1%}..{max(values):+.1%})"


def show(rows: list[dict[str, Any]]) -> None:
    titles = ("streams", "", "requests/s", "tokens/s", "limit", "first, ms", "p99", "between, ms", "p99", "main us")
    titles += ("load",)
    widths = (7, 11, 11, 9, 9, 10, 8, 12, 8, 8, 6)
    print("".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)))
    for row in rows:
        limit = f"{row['limit']:.0f}" if row["limit"] else "-"
        cells = (
            row["streams"], row["side"], f"{row['requests_per_second']:.2f}", f"{row['tokens_per_second']:.0f}", limit,
            f"{row['first_p50']:.1f}", f"{row['first_p99']:.1f}", f"{row['gap_p50']:.2f}", f"{row['gap_p99']:.2f}",
            f"{row['main_us']:.0f}", f"{row['loadavg']:.1f}",
        )  # fmt: skip
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    for row in rows:
        if "overheads" in row:
            cpu = row["cpu"]
            print(
                f"{row['streams']:>4} streams: the server takes {spread(row['overheads'])} of the time in process, "
                f"{spread(row['cpu_overheads'])} of its processor time; processor seconds of {row['seconds']:.1f}: "
                f"server {cpu['process']:.2f}, children {cpu['children']:.2f}, client {cpu['client']:.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="any name that Octavo knows (default: its default model)")
    which.add_argument("--tiny", action="store_true", help="a model of two small layers with random weights")
    which.add_argument("--shape", type=Path, metavar="DIR", help="random weights of the shape of DIR/config.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="mean length of an output")
    parser.add_argument("--words", type=int, default=24, help="of a prompt")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests")
    parser.add_argument("--max-num-seqs", type=int, help="sequences that run at once (default: the engine's)")
    parser.add_argument("--threads", type=int, help="of both engines (default: as many as there are cores)")
    parser.add_argument("--out", "--json", type=Path)
    given = parser.parse_args()
    sys.path[:0] = [str(TESTS / "runtime"), str(TESTS / "server")]
    from octavo.host import usable_cores
    from octavo.models.sources import DEFAULT_MODEL
    from serving_helpers import program

    threads = given.threads or usable_cores()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings: dict[str, Any] = {"model": given.model or DEFAULT_MODEL, "device": given.device}
        if given.tiny:
            from tiny_models import make_model

            settings["model"] = str(make_model("llama-head-dim", Path(folder)))
        elif given.shape:
            from server_shape import model_of_shape

            settings |= {"model": str(model_of_shape(given.shape, Path(folder))), "load_format": "dummy"}
        if given.max_num_seqs:
            settings["max_num_seqs"] = given.max_num_seqs
        options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        stack.enter_context(redirect_stdout(sys.stderr))  # the end of the server's log
        running = stack.enter_context(program(*options, "--served-model-name", NAME, threads=threads))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        beside = stack.enter_context(engine(settings, environment))
        report: dict[str, Any] = {"settings": settings, "threads": threads, "runs": []}
        measure(given, Server(running.url, running.process.pid), beside, report)
        report["limits"] = beside.ask("")
    report["table"] = summary(report["runs"], report["limits"])
    keep(report, given.out)
    show(report["table"])
    print(f"{threads} threads, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
