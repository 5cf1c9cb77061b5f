"""Cheap argument checks: shapes, dtypes and strides only, never values (which would wait for the GPU).

Each raises a `ValueError` which names the argument, what it should be and what it was.
"""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """`tensor` has exactly this shape; -1 stands for any size."""
    actual = tuple(tensor.shape)
    if actual == expected:
        return
    if len(actual) != len(expected) or any(e not in (-1, a) for a, e in zip(actual, expected, strict=True)):
        raise ValueError(f"{name} has shape {list(actual)}; expected {list(expected)} (-1 is any size)")


def dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """`tensor` has one of these dtypes."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}; expected {' or '.join(str(d) for d in allowed)}")


def unit_stride(name: str, tensor: torch.Tensor) -> None:
    """Neighbours in the last dimension of `tensor` are neighbours in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension; call .contiguous() first")


def vector(name: str, tensor: torch.Tensor, size: int, kind: torch.dtype) -> None:
    """`tensor` is a contiguous vector of `size` elements of dtype `kind`."""
    shape(name, tensor, (size,))
    dtype(name, tensor, kind)
    unit_stride(name, tensor)


def kv_scales(scales: torch.Tensor | None, cache: torch.Tensor) -> None:
    """An FP8 cache has its scales, no other cache has any."""
    if (cache.dtype == torch.float8_e4m3fn) != (scales is not None):
        raise ValueError(f"kv_scales go with a cache of {torch.float8_e4m3fn}, and with no other; it is {cache.dtype}")
    if scales is not None:
        shape("kv_scales", scales, (2, cache.shape[1]))
        dtype("kv_scales", scales, torch.float32)
        if not scales.is_contiguous():
            raise ValueError("kv_scales must be contiguous")


def output(name: str, tensor: torch.Tensor, expected: tuple[int, ...], kind: torch.dtype) -> None:
    """A caller's output buffer has the shape and the dtype of the result."""
    shape(name, tensor, expected)
    dtype(name, tensor, kind)
    unit_stride(name, tensor)
