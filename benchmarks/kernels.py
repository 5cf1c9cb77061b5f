"""How close to the hardware's limit does each kernel come?

Times every operator of `octavo_kernels` on the GPU at shapes of real models (`kernel_cases.py`), beside it the vendor's
products (`F.linear`), and prints the bytes each must move (or the products it must do), the least time the chip needs
for them and the share of it that is reached. Writes the same as JSON with `--json FILE`.

    python benchmarks/kernels.py [--only attention] [--json kernels.json]
    python benchmarks/kernels.py --check       every case once at tiny sizes, on any device: does it all still run?

Times are medians of CUDA graph replays, so that the host's launch cost, which a captured decode step does not pay, is
left out. Weights, keys and values are rotated among copies of over 200 MB together, within the captured graph, so that
they come from memory as they do in a model, not from the 50 MB of L2. Activations and logits of a few MB stay in L2, as
they do there; such a kernel can be above its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice

import torch
from kernel_cases import FULL, TINY, Case, Cases

# name in the device's properties -> (memory TB/s, dense bf16 TFLOP/s), from the vendor's data sheets
CHIPS = {
    "H200": (4.8, 989.0), "H100 PCIe": (2.0, 756.0), "H100": (3.35, 989.0), "B200": (8.0, 2250.0),
    "A100-SXM4-80GB": (2.04, 312.0), "A100": (1.55, 312.0), "L40S": (0.864, 362.0), "4090": (1.01, 165.0),
}  # fmt: skip
ENOUGH = 1000.0  # microseconds of a graph, so that the clock's step and the graph's own launch do not count
MOST_CALLS = 256


@dataclass(frozen=True)
class Chip:
    """TB/s and TFLOP/s."""

    name: str
    bandwidth: float
    products: float

    def limit(self, case: Case) -> float:
        """Microseconds that a case takes at least."""
        return max(case.size / self.bandwidth, case.operations / self.products) / 1e6


@dataclass(frozen=True)
class Row:
    kernel: str
    shape: str
    microseconds: float
    megabytes: float
    gigaflop: float
    limit_microseconds: float
    share_of_limit: float


def this_chip() -> Chip:
    name = torch.cuda.get_device_properties(0).name
    unknown = (float("nan"), float("nan"))
    return Chip(name, *next((value for key, value in CHIPS.items() if key in name), unknown))


def time_graph(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Median microseconds of one call, from a graph that goes through all `calls`, as often as takes a millisecond."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in (*calls[:3], calls[0]):
            call()
    stream.synchronize()
    total, count = 0.0, len(calls)
    while True:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in islice(cycle(calls), count):
                call()
        graph.replay()
        total = statistics.median(_replay(graph) for _ in range(repeats))
        more = min(int(ENOUGH / total) + 1, MOST_CALLS // count)
        if more < 2:
            return total / count
        count *= more  # whole rounds of the copies


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def measure(chip: Chip, case: Case) -> Row:
    took, limit = time_graph(case.calls), chip.limit(case)
    return Row(case.kernel, case.shape, took, case.size / 1e6, case.operations / 1e9, limit, limit / took)


def show(row: Row) -> None:
    work = f"{row.megabytes:9.2f} MB {row.gigaflop:9.1f} GF limit {row.limit_microseconds:8.1f} us"
    print(
        f"{row.kernel:20} {row.shape:48} {row.microseconds:9.1f} us {work} {row.share_of_limit:6.1%}", flush=True
    )  # fmt: skip


def check(device: torch.device, only: str) -> int:
    """Run all calls of all cases at tiny sizes; what comes back must be finite. How many cases there were."""
    count = 0
    for case in Cases(TINY, device, only):
        for call in case.calls:
            result = call()
            for value in result if isinstance(result, tuple) else (result,):
                finite = not isinstance(value, torch.Tensor) or bool((value == value).all())
                if not finite or not case.size > 0:
                    raise RuntimeError(f"{case.kernel} {case.shape}: NaN, or no bytes")
        print(f"{case.kernel:20} {case.shape}")
        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--check", action="store_true", help="run every case once at tiny sizes, time nothing")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if options.check:
        return 0 if check(torch.device("cuda" if gpu else "cpu"), options.only) else 1
    if not gpu:
        print("no CUDA device here: the kernels cannot be timed (--check runs them all the same)", file=sys.stderr)
        return 1
    chip, rows = this_chip(), list[Row]()
    print(f"{chip.name}, torch {torch.__version__}: {chip.bandwidth} TB/s, {chip.products} TFLOP/s in bf16")
    for case in Cases(FULL, torch.device("cuda"), options.only):
        rows.append(measure(chip, case))
        show(rows[-1])
    if options.json:
        with open(options.json, "w") as file:
            json.dump({
                "device": chip.name, "torch": torch.__version__, "terabytes_per_second": chip.bandwidth,
                "rows": [asdict(row) for row in rows],
            }, file, indent=1)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
