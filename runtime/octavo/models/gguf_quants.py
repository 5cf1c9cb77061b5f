"""From the quantised blocks of a GGUF tensor to numbers in place. Called by `weights.GGUFWeights`.

Q4_0, Q4_1 and Q8_0 are computed with a few vectorised torch operators over pieces that stay in the processor's cache,
in the same order of roundings as `gguf.quants`, so that the bits agree (a test says so) at many times the speed. Every
other type goes through `gguf.quants.dequantize`, some rows at a time. Block layouts:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

# Elements dequantised at a time, at most (a row or two may exceed it): 128 KiB of float32, which stay in the cache.
# Also fewer than torch's grain of 32768, so that each operator runs in this thread alone: thousands of short parallel
# regions made loading up to a hundred times slower on a busy machine, where each waits for a thread to get its turn.
_PIECE = 32767


def _q4(blocks: torch.Tensor, head: int, out: torch.Tensor) -> None:
    """The sixteen low, then the sixteen high nibbles of each block, as float32 into `out` `[n, 32]`."""
    quants = blocks[:, head:]
    out[:, :16] = quants & 15
    out[:, 16:] = quants >> 4


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The little-endian float16 at byte `at` of every block, as float32 `[n, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q4(blocks, 2, out)
    out.sub_(8.0).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q4(blocks, 4, out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))  # two roundings, as gguf.quants: no fused multiply-add


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


# name -> (elements a block, bytes a block, kernel)
_FAST: dict[str, tuple[int, int, Callable[[torch.Tensor, torch.Tensor], None]]] = {
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q8_0": (32, 34, _q8_0),
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def _rows_at_a_time(limit: int, step: int) -> int:
    if limit >= step:
        return limit // step * step
    return max((rows for rows in range(2, limit + 1, 2) if step % rows == 0), default=2)


def dequantised_rows(raw: torch.Tensor, type_name: str, rows: int, columns: int, step: int) -> Iterator[torch.Tensor]:
    """Yield the tensor of `rows` by `columns` in order, some rows at a time.

    Args:
        raw: the bytes of the tensor, uint8 `[nbytes]`; only read.
        type_name: ggml's name of the type, such as "Q4_1".
        step: rows that belong together (a head, where rows are permuted later): a piece is some whole steps, or an even
            part of one step.

    Yields float32 (or the stored floating type) `[n, columns]`; the storage is reused for the next piece.
    Raises `NotImplementedError` for a type that `gguf.quants` does not know.
    """
    count = _rows_at_a_time(max(_PIECE // columns, 1), step)
    if type_name in _PLAIN:
        yield raw.view(_PLAIN[type_name]).view(rows, columns)
        return
    data = raw.view(rows, -1)
    if type_name not in _FAST:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[type_name]
        for first in range(0, rows, count):
            yield torch.from_numpy(dequantize(data[first : first + count].numpy(), kind))
        return
    block, block_bytes, kernel = _FAST[type_name]
    buffer = torch.empty(min(count, rows) * columns // block, block)
    for first in range(0, rows, count):
        blocks = data[first : first + count].reshape(-1, block_bytes)
        out = buffer[: len(blocks)]
        kernel(blocks, out)
        yield out.view(-1, columns)
