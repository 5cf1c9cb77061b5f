"""Compiles the kernels of a step side by side before the step runs. Called once, when a model is made ready on a GPU.

Triton compiles a kernel at its first launch, one after the other: the fourteen of a decoder took 5.5 s. LLVM, the
assembler and the C compiler of launchers release the interpreter's lock, so threads help.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

THREADS = 8


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """What this thread launches inside is not run but noted, once for each form; at the end all is compiled and loaded.
    Launches of other threads run. Raises what a compilation raises."""
    from triton.runtime.jit import JITFunction

    original, here, device = JITFunction.run, threading.get_ident(), torch.cuda.current_device()
    noted: dict[Any, Any] = {}

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)
        form = (id(self), *map(_form, args), *((name, _form(value)) for name, value in kwargs.items()))
        noted.setdefault(form, (self, args, kwargs))
        return None

    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = original

    def compile_one(launch: Any) -> None:
        function, args, kwargs = launch
        torch.cuda.set_device(device)
        kernel = original(function, *args, grid=(1,), warmup=True, **kwargs)
        _ = kernel.run  # makes the launcher and loads the code

    longest_first = sorted(noted.values(), key=lambda launch: -len(launch[0].src))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(compile_one, longest_first))


def _form(value: Any) -> Any:
    """What Triton may distinguish of an argument; more than that costs a look-up, less would leave out a kernel."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool) and value > 16:
        return "int", value % 16 == 0, value >= 2**31
    return value if not isinstance(value, float) else "float"
