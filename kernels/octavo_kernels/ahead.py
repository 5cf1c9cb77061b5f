"""Compiles the kernels of a step side by side before the step runs. Called once, when a model is made ready on a GPU.

Triton compiles a kernel at its first launch, one after the other: the fourteen of a decoder took 5.5 s. LLVM, the
assembler and the C compiler of launchers release the interpreter's lock, so threads help.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

THREADS = 8


@contextmanager
def compiled_ahead(meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What this thread launches inside is not run but noted, once for each form; at the end all is compiled and loaded,
    while this thread does something else `meanwhile`. Launches of other threads run. Raises what a compilation
    raises."""
    from triton.runtime.jit import JITFunction

    original, here, device = JITFunction.run, threading.get_ident(), torch.cuda.current_device()
    noted: dict[Any, Any] = {}

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)
        noted.setdefault(_form(self, args, kwargs), (self, args, kwargs))
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
        compiled = [pool.submit(compile_one, launch) for launch in longest_first]
        meanwhile()
        for one in compiled:
            one.result()


def _form(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What Triton distinguishes of a launch: the same form twice would be compiled twice, at the same time."""
    parameters = {parameter.name: parameter for parameter in function.params}
    values = dict(zip(parameters, args, strict=False)) | kwargs
    found = []
    for name, value in values.items():
        parameter = parameters.get(name)
        if isinstance(value, torch.Tensor):
            anywhere = parameter is not None and parameter.do_not_specialize_on_alignment
            value = value.dtype, anywhere or value.data_ptr() % 16 == 0
        elif parameter is None or parameter.is_constexpr:
            pass  # an option such as the number of warps, or a constant
        elif isinstance(value, int) and not isinstance(value, bool):
            special = () if parameter.do_not_specialize else (value == 1, value % 16 == 0)
            value = "int", value >= 2**31, *special
        elif isinstance(value, float):
            value = "float"
        found.append((name, value))
    return id(function), *found
