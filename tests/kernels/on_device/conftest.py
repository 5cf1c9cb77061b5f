"""Where the cases of this folder run: on the GPU where there is one, else in Triton's interpreter on the CPU.

Their files are called `cases_*.py` so that only `tests/kernels/test_kernels.py` starts them, in a process of their own.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert os.environ.get("TRITON_INTERPRET") == "1", "start these cases through tests/kernels/test_kernels.py"
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)
