"""Where the cases of this folder run: on the GPU where there is one, else in Triton's interpreter on the CPU.

Their files are called `cases_*.py` so that only `tests/kernels/test_kernels.py` starts them, in a process of their own.
"""

import os

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def no_gpu_unless_asked_for() -> None:
    """These ask for it."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert os.environ.get("TRITON_INTERPRET") == "1", "start these cases through tests/kernels/test_kernels.py"
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(scope="session", autouse=True)
def right_numbers_of_fp8() -> None:
    """Triton's interpreter loses a carry when it rounds to e4m3 (31.7 becomes 16) and reads its NaN as 480: here torch
    converts for it. A GPU does it itself."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values, input_dtype, output_dtype, rounding_mode):
        if output_dtype == tl.float8e4nv and input_dtype == tl.float32:
            bits = np.ascontiguousarray(values).view(np.float32).copy()
            return torch.from_numpy(bits).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if input_dtype == tl.float8e4nv and output_dtype == tl.float32:
            stored = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).copy())
            return stored.view(torch.float8_e4m3fn).float().numpy().view(np.uint32)
        assert tl.float8e4nv not in (input_dtype, output_dtype), f"{input_dtype} to {output_dtype}"
        return original(values, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = convert
