"""How fast do all threads together read memory? Asked by `octavo bench`: the limit of decoding one request.

How many places a thread reads at once can matter, because the processor fetches ahead for each: in one run three places
gave 41 GB/s and one 32 (2 threads), in another both gave 34. So several are tried; the best median is the machine's.
"""

from __future__ import annotations

import statistics
import time

import torch
from llvmlite import ir

from octavo_kernels.cpu.compiler import Library, kept_objects
from octavo_kernels.cpu.emit import Code, v16i
from octavo_kernels.cpu.program import Program, Team, functions

STREAMS = (1, 2, 3, 4, 6)
PASSES = 5
_PIECE = 256  # bytes that a thread reads in one place before it goes to the next


def read_bandwidth(memory: torch.Tensor, threads: int) -> float:
    """Bytes a second over `memory`, which should be much larger than the caches."""
    library = Library(_module, cache=kept_objects(), key="bandwidth")
    team, step, sums = Team(library, threads), torch.zeros(1, dtype=torch.int64), torch.zeros(threads, 64)
    best = 0.0
    for streams in STREAMS:
        pieces = memory.nbytes // (_PIECE * streams * threads)
        program = Program([(library.address(f"read_{streams}"), (memory, pieces, sums))])
        seconds = []
        for _ in range(PASSES):
            began = time.perf_counter()
            team.run(program, step)
            seconds.append(time.perf_counter() - began)
        best = max(best, pieces * _PIECE * streams * threads / statistics.median(seconds))
    team.close()
    return best


def _module() -> ir.Module:
    module = ir.Module("bandwidth")
    functions(module)
    for streams in STREAMS:
        read(module, f"read_{streams}", streams)
    return module


def read(module: ir.Module, name: str, streams: int) -> None:
    """args: memory; pieces that a thread reads in each of its places; int32 `[threads, 64]` for the sums, without which
    nothing would be read."""
    code = Code(module, name)
    memory, pieces = code.pointer(0), code.arg(1)
    sums = [code.variable(code.ints(0)) for _ in range(4)]
    begin = code.mul(code.thread, pieces, _PIECE * streams)
    with code.loop(0, pieces) as piece:
        for stream in range(streams):
            at = code.add(begin, code.mul(pieces, stream * _PIECE), code.mul(piece, _PIECE))
            for number, total in enumerate(sums):
                total.set(code.b.add(total.get(), code.load(memory, code.add(at, 64 * number), v16i)))
    for number, total in enumerate(sums):
        code.store(total.get(), code.pointer(2), code.add(code.mul(code.thread, 256), 64 * number))
    code.finish()
