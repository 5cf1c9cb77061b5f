"""How fast is Octavo on this machine's CPU, beside its peers? Prints a table, writes JSON.

    python benchmarks/cpu.py [--rounds 3] [--python vllm=PATH llama.cpp=PATH openvino=PATH] [--out results.json]

Four workloads (`cpu_workloads.py`), the seconds from the start of a process to its first token, and the memory it took.
Every engine runs in a process of its own in every round, one after another and all once a round, so that what else the
machine does hits all of them; the median of the rounds counts. An engine that can be run in several ways runs in all
and the better one counts, workload by workload. Peers are installed where you like: `--python` names the interpreter
that can import one (without it, this one is tried); one that cannot be imported is left out.

The limit beside the figures: a step reads every weight once and multiplies `rows` tokens with it, so tokens/s
cannot exceed rows / max(bytes / bandwidth, operations / rate), with both measured by `octavo.bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_workloads import NAMES, RUN, better

HERE = Path(__file__).parent
MODULES = {
    "octavo": "octavo",
    "transformers": "transformers",
    "llama.cpp": "llama_cpp",
    "vllm": "vllm",
    "openvino": "openvino_genai",
}
LLAMA = ({"by": "batch"}, {"by": "request"})
VLLM = ({"by": "one process"}, {"by": "two processes"})


@dataclass(frozen=True)
class Column:
    """One engine with settings; `modes` are ways to run it, of which the better one counts."""

    name: str
    engine: str
    file: str = "given"
    """The model: "given" as it is, "Q4_0" or "Q8_0" made of it by llama.cpp, "folder" in bfloat16 made of it."""
    modes: tuple[dict[str, Any], ...] = ({},)
    shape: dict[str, Any] | None = None
    """With `--shape`: these settings as well, and the folder of the shape; None: the file of random weights."""


COLUMNS = (
    Column("octavo", "octavo"),
    Column("octavo bf16", "octavo", modes=({"dtype": "bfloat16"},), shape={"load_format": "dummy"}),
    Column("transformers", "transformers", shape={"dummy": True}),
    Column("llama.cpp", "llama.cpp", modes=LLAMA),
    Column("llama.cpp Q4_0", "llama.cpp", "Q4_0", modes=LLAMA),
    Column("llama.cpp Q8_0", "llama.cpp", "Q8_0", modes=LLAMA),
    Column("vllm", "vllm", "folder", VLLM, shape={"load_format": "dummy"}),
    Column("openvino", "openvino"),
)


@dataclass
class Bench:
    given: argparse.Namespace
    pythons: dict[str, str]
    work: Path
    runs: list[dict[str, Any]] = field(default_factory=list)

    def available(self) -> list[Column]:
        """The columns that were asked for and can be run; says which cannot."""
        asked = self.given.engines
        columns = [c for c in COLUMNS if not asked or c.name in asked or c.engine in asked]
        found = {c.engine: self.imports(c.engine) for c in columns}
        for engine, there in found.items():
            if not there:
                print(f"{engine} is left out: {self.pythons[engine]} has no module {MODULES[engine]}")
        if self.given.shape:  # random weights have one form
            columns = [c for c in columns if c.file not in ("Q4_0", "Q8_0")]
        return [c for c in columns if found[c.engine]]

    def imports(self, engine: str) -> bool:
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({MODULES[engine]!r}) is None)"
        return subprocess.run([self.pythons[engine], "-c", code], check=False).returncode == 0

    def model(self, column: Column) -> str:
        """The file or folder that a column runs, made when it is not there yet."""
        if self.given.shape and column.shape is not None:
            return str(self.given.shape)
        source = Path(self.given.model)
        if column.file == "given" or not source.is_file():
            return str(source)
        stamp = f"{source.stem}-{source.stat().st_size}"
        if column.file == "folder":
            target, python, task = self.work / f"{stamp}-bf16", sys.executable, ["dequantise"]
        else:
            target = self.work / f"{stamp}-{column.file}.gguf"
            python, task = self.pythons["llama.cpp"], ["requantise"]
        if not target.exists():
            command = [python, str(HERE / "cpu_files.py"), *task, str(source), str(target)]
            done = subprocess.run([*command, column.file], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(last_line(done.stderr))
        return str(target)

    def run(self, column: Column, mode: dict[str, Any], number: int) -> None:
        """One process: its figures, or why there are none, go to `runs`."""
        label = f"{column.name} {mode.get('by', '')}".strip()
        record: dict[str, Any] = {"column": column.name, "mode": mode, "round": number, "failed": {}}
        self.runs.append(record)
        try:
            settings = mode | (column.shape or {} if self.given.shape else {})
            asked = {"engine": column.engine, "model": self.model(column), "settings": settings}
            asked |= {"workloads": self.given.workloads, "requests": self.given.requests}
            python = self.pythons[column.engine]
            environment = os.environ | surroundings(column.engine, python)
            # pip compiles what it installs to bytecode; a checkout, such as Octavo's, must be allowed to keep its own
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            began = time.time()
            command = [python, str(HERE / "cpu_engines.py"), json.dumps(asked)]
            record |= json.loads(last_line(output_of(command, environment, self.given.timeout)))
            record["ready"] = record["first_token_at"] - began
        except Exception as problem:
            record["failed"]["all"] = str(problem)
        for name, why in record["failed"].items():
            print(f"round {number}: {label} failed in {name}: {why}")
        values = [f"{name} {value:.1f}" for name in NAMES if (value := figure(record, name)) is not None]
        print(f"round {number}: {label:24} {', '.join(values)}", flush=True)


def random_model(shape: Path, work: Path) -> Path:
    target = work / f"{shape.name}-random-Q4_0.gguf"
    if not target.exists():
        work.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        subprocess.run([sys.executable, str(HERE / "random_gguf.py"), str(shape), str(part)], check=True)
        part.rename(target)
    return target


def surroundings(engine: str, python: str) -> dict[str, str]:
    """Environment that an engine wants before its process starts: vLLM's documentation for CPUs names all of these."""
    if engine != "vllm":
        return {}
    cores = sorted(os.sched_getaffinity(0))
    libraries = []
    for pattern in ("libtcmalloc_minimal.so.4", "libiomp5.so"):
        places = (Path(python).parents[1] / "lib", Path("/usr/lib"), Path("/usr/lib64"))
        found = [path for place in places for path in sorted(place.glob(pattern)) + sorted(place.glob(f"*/{pattern}"))]
        libraries += [str(path) for path in found[:1]]
    return {
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "LD_PRELOAD": ":".join(libraries),
    }


def output_of(command: list[str], environment: dict[str, str], timeout: float) -> str:
    """What a command printed. Its processes are a group of their own, which is ended with it: what an engine leaves
    behind would run beside the next one, and keep a pipe open (therefore files)."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as problems:
        process = subprocess.Popen(command, stdout=out, stderr=problems, env=environment, start_new_session=True)
        try:
            status = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        problems.seek(0)
        if status:
            raise RuntimeError(last_line(problems.read().decode(errors="replace")))
        return out.read().decode(errors="replace")


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def figure(run: dict[str, Any], name: str) -> float | None:
    value = run.get(name)
    return value["value"] if isinstance(value, dict) else value


def summarise(runs: list[dict[str, Any]], columns: list[Column]) -> dict[str, dict[str, float]]:
    """Row, column: the median over the rounds, of the better mode; the memory is that of the mode which W3 counts."""
    rows: dict[str, dict[str, float]] = {}
    for column in columns:
        medians: dict[str, dict[int, float]] = {}
        for name in NAMES:
            for place, mode in enumerate(column.modes):
                mine = [run for run in runs if run["column"] == column.name and run["mode"] == mode]
                values = [value for run in mine if (value := figure(run, name)) is not None]
                if values and len(values) == len(mine):  # a mode that failed once is not counted
                    medians.setdefault(name, {})[place] = statistics.median(values)
        chosen = medians.get("W3", {})
        if "memory" in medians and chosen:
            winner = max(chosen, key=lambda place: chosen[place])
            medians["memory"] = {winner: medians["memory"][winner]}
        for name, by_mode in medians.items():
            rows.setdefault(name, {})[column.name] = better(name, list(by_mode.values()))
    return {name: rows[name] for name in NAMES if name in rows}


def show(rows: dict[str, dict[str, float]], columns: list[Column], limits: dict[str, dict[str, float]]) -> None:
    names = [column.name for column in columns]
    ours = [column.name for column in columns if column.engine == "octavo"]
    peers = [name for name in names if name not in ours]
    print(f"\n| {'':31} | " + " | ".join(f"{name:>12}" for name in names) + " |")
    print(f"|{'-' * 33}|" + "|".join(f"{'-' * (max(12, len(name)) + 1)}:" for name in names) + "|")
    for row, values in rows.items():
        cells = [f"{values[name]:.{1 if values[name] < 100 else 0}f}" if name in values else "-" for name in names]
        line = [f"{cell:>{max(12, len(name))}}" for cell, name in zip(cells, names, strict=True)]
        print(f"| {NAMES[row]:31} | {' | '.join(line)} |")
    print("\nbeside the best peer (above 1: octavo is better), and the limit of the machine for such weights")
    for row, values in rows.items():
        theirs = {name: values[name] for name in peers if name in values}
        for name in ours:
            if name not in values:
                continue
            text = f"{NAMES[row]:31} {name:12}"
            if theirs:
                best = better(row, list(theirs.values()))
                whose = next(peer for peer, value in theirs.items() if value == best)
                ratio = best / values[name] if better(row, [0, 1]) == 0 else values[name] / best
                text += f" {ratio:6.2f} of {whose}"
            limit = limits.get(name, {}).get(row)
            text += f"  limit {limit:.1f}" if limit else ""
            if theirs or limit:
                print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file, or any name that Octavo knows")
    parser.add_argument("--shape", type=Path, metavar="DIR", help="random weights of the shape of DIR/config.json")
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PATH", help=f"engines: {', '.join(MODULES)}")
    parser.add_argument("--engines", nargs="+", help=f"of: {', '.join(c.name for c in COLUMNS)}; or an engine's name")
    parser.add_argument("--workloads", nargs="+", choices=list(RUN), default=list(RUN))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds that one process may take")
    parser.add_argument("--work", type=Path, help="where files made for the peers are kept (default: a folder of temp)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pythons = dict.fromkeys(MODULES, sys.executable)
    for entry in given.python:
        engine, _, path = entry.partition("=")
        if engine not in MODULES or not path:
            parser.error(f"--python {entry}: give one of {', '.join(MODULES)} as NAME=PATH")
        pythons[engine] = path

    from octavo.models.sources import DEFAULT_MODEL, resolve

    work = given.work or Path(tempfile.gettempdir()) / "octavo-benchmark"
    if given.shape:
        given.model = str(random_model(given.shape.resolve(), work))
    else:
        given.model = str(resolve(given.model or DEFAULT_MODEL).path)
    bench = Bench(given, pythons, work)
    columns = bench.available()
    for number in range(1, given.rounds + 1):
        for column in columns:
            for mode in column.modes:
                bench.run(column, mode, number)
    rows = summarise(bench.runs, columns)
    limits = {run["column"]: run["limits"] for run in bench.runs if "limits" in run}
    show(rows, columns, limits)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"model": given.model, "table": rows, "limits": limits, "runs": bench.runs}
        given.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
