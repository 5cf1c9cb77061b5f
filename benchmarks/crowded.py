"""What do other processes on the same cores cost a program of CPU kernels? Prints milliseconds a step, and the
processor's.

    python benchmarks/crowded.py [--busy 0 1 2] [--seconds 3] [--rounds 3]

A step is like one token of the default model: 30 layers of 4 kernels that read 96 MB in all and 5 that do next to
nothing. Teams take turns: of one thread, of all, and of all that leaves threads out. Needs no AVX512, unlike the model.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch
from llvmlite import ir
from octavo.host import usable_cores
from octavo_kernels.cpu.compiler import Library
from octavo_kernels.cpu.emit import Code, v16i
from octavo_kernels.cpu.program import Program, Team, functions

LAYERS, READS, SMALL = 30, 4, 5
READ_BYTES = 96 * 2**20 // (LAYERS * READS) // 64 * 64


def module() -> ir.Module:
    """`read`: args memory, vectors, sums of every thread; its share of the vectors is added up."""
    made = ir.Module("crowded")
    functions(made)
    Code(made, "nothing").finish()
    code = Code(made, "read")
    total = code.variable(code.ints(0))
    first, last = code.share(code.arg(1))
    with code.loop(first, last) as at:
        total.set(code.b.add(total.get(), code.load(code.pointer(0), code.mul(at, 64), v16i)))
    code.store(total.get(), code.pointer(2), code.mul(code.thread, 64))
    code.finish()
    return made


class Turns:
    """A team and what its steps took."""

    def __init__(self, name: str, team: Team, program: Program) -> None:
        self.name, self._team, self._program = name, team, program
        self._step = torch.zeros(1, dtype=torch.int64)
        self.steps: list[float] = []
        self.processor = 0.0

    def run(self, seconds: float) -> None:
        end, before = time.perf_counter() + seconds, time.process_time()
        while (began := time.perf_counter()) < end:
            self._team.run(self._program, self._step)
            self.steps.append(time.perf_counter() - began)
        self.processor += time.process_time() - before

    def report(self) -> str:
        whole = sum(self.steps) / len(self.steps)
        return (
            f"  {self.name:24} mean {1000 * whole:8.2f}  median {1000 * statistics.median(self.steps):8.2f}  "
            f"longest {1000 * max(self.steps):8.0f}  processor {1000 * self.processor / len(self.steps):7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    library, cores = Library(module, cache=None), usable_cores()
    memory = torch.ones(LAYERS * READS, READ_BYTES // 4, dtype=torch.int32)
    sums = torch.zeros(max(cores, 2), 16, dtype=torch.int32)
    read, nothing = library.address("read"), library.address("nothing")
    kernels = [
        kernel
        for layer in range(LAYERS)
        for kernel in [
            *((read, [memory[layer * READS + k], READ_BYTES // 64, sums]) for k in range(READS)),
            *[(nothing, [])] * SMALL,
        ]
    ]
    program = Program(kernels)
    for busy in given.busy:
        turns = [
            Turns("1 thread", Team(library, 1), program),
            Turns(f"{cores} threads", Team(library, cores), program),
            Turns(f"{cores}, fewer if crowded", Team(library, cores, yields=True), program),
        ]
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for _ in range(given.rounds):
                for turn in turns:
                    turn.run(given.seconds)
        finally:
            for other in others:
                other.kill()
                other.wait()
        print(f"{busy} busy processes beside it, ms a step")
        for turn in turns:
            print(turn.report(), flush=True)


if __name__ == "__main__":
    main()
