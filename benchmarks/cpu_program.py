"""Where does a step on packed weights go (`quantization="gguf"`)? Prints milliseconds and the rate of the products.

    python benchmarks/cpu_program.py [--rows 1 64 512] [--keys 128]

All kernels of one kind, each with its own layer's weights, as one program; then the whole step; then a prompt of 1024
tokens through the engine, a program of empty kernels, and the choice of the largest logit by numpy and by torch. The
median of 9. Most keys and values were never written and share one page of zeros: attention is at its best here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median(action: Callable[[], Any], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def step_of(tokens: int, keys: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A step of so many sequences with one new token each, and the tensors that it points to."""
    blocks = -(-keys // 32)
    table = torch.arange(1, 1 + tokens * blocks, dtype=torch.int32).view(tokens, blocks)
    ids, positions = torch.randint(0, 1000, (tokens,)), torch.full((tokens,), keys - 1)
    slots = table[:, -1].long() * 32 + (keys - 1) % 32
    rows = torch.arange(tokens, dtype=torch.int32)
    items = torch.stack([rows, torch.ones_like(rows)], dim=1).contiguous()
    held = [ids, positions, slots, rows, items, table]
    addresses = [tensor.data_ptr() for tensor in held[:-1]]
    return torch.tensor([tokens, *addresses, tokens, table.data_ptr(), blocks]), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--keys", type=int, default=128)
    given = parser.parse_args()

    from llvmlite import ir
    from octavo import LLM, SamplingParams
    from octavo_kernels.cpu.compiler import Library
    from octavo_kernels.cpu.emit import Code
    from octavo_kernels.cpu.program import Program, Team, functions

    with LLM(quantization="gguf", enable_prefix_caching=False) as llm:
        model: Any = llm.engine.service.call(lambda core: core.runner.model)
        kinds: dict[str, list[Any]] = {}
        for name, args in model._forward_steps():
            kind = f"{name} {args[-1]}" if name.startswith("multiply") else name
            kinds.setdefault(kind, []).append((name, args))
        for rows in given.rows:
            step, _held = step_of(rows, min(given.keys, 65536 // rows // 32 * 32))
            products, operations = 0.0, 0
            print(f"\n{rows} rows")
            for kind, steps in kinds.items():
                program = model._program(steps)
                taken = median(lambda: model._team.run(program, step))  # noqa: B023
                print(f"  {kind:34} x{len(steps):<3} {taken:8.2f} ms")
                if kind.startswith("multiply"):
                    products += taken
                    inputs = int(kind.split("_")[2])
                    operations += 2 * rows * inputs * steps[0][1][-1] * len(steps)
            whole = median(lambda: model._team.run(model._forward, step))  # noqa: B023
            rate = operations / products / 1e6
            print(f"  the whole step                          {whole:8.2f} ms; products {rate:.0f} GOP/s")
        prompt, one = [100 + k for k in range(1024)], SamplingParams(max_tokens=1)
        taken = median(lambda: llm.generate(prompt, one), 5)
        print(f"\na prompt of 1024 tokens                   {taken:8.2f} ms, {1024 / taken * 1000:.0f} tokens/s")

    def empty() -> ir.Module:
        module = ir.Module("empty")
        functions(module)
        Code(module, "nothing").finish()
        return module

    library = Library(empty, cache=None)
    team = Team(library, torch.get_num_threads())
    nothing = Program([(library.address("nothing"), [])] * 270)
    step = torch.zeros(1, dtype=torch.int64)
    print(f"270 empty kernels                         {median(lambda: team.run(nothing, step), 99):8.3f} ms")
    small = torch.randn(64, 64)
    operators = median(lambda: [torch.add(small, small, out=small) for _ in range(270)])
    print(f"270 torch.add of 4096 values              {operators:8.3f} ms")
    logits = torch.randn(64, 49152)
    print(f"largest of 64 x 49152 logits, numpy       {median(lambda: logits.numpy().argmax(-1)):8.3f} ms")
    print(f"                              torch       {median(lambda: logits.max(-1).indices):8.3f} ms")


if __name__ == "__main__":
    main()
