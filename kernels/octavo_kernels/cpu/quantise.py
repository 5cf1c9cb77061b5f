"""From numbers to blocks of 4 or 8 bits (Q4_1, Q8_0), as `packed.Packer` takes them. Called while weights are loaded.

A block of 32 values has a scale d, in Q4_1 also a minimum m, both float16: w = d * q + m. Here d and m of Q4_1 are
chosen for the least squared error. Some spans are tried (how many steps lie between a block's smallest and largest
value; beyond 15, the ends are cut off), each with the best d and m for its q; then the best one's q is rounded again
and d and m fitted once more. Of normally distributed weights this leaves 91 % of the error (root mean square) of
rounding between minimum and maximum; ten spans and two fits each would leave 89 %.

numpy, not torch: its operators stay in the thread that calls them, so that two threads pack two matrices without
waiting for each other, and pieces can be large enough that the interpreter's lock is seldom what they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Kernel = Callable[[Array, Sequence[Array]], Iterator[Array]]
"""From values (a column is a block) and four arrays of its size to write to: the bytes of the blocks, in order."""

BLOCK = 32
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Of a block."""
LEVELS = 15
"""The largest q of 4 bits."""
SPANS = (14, 15, 16)
_PIECE = 1 << 18
"""Values at a time, some MB in all: two threads made 123 million Q4_1 values a second, 65 with a quarter of that."""
_TINY = 1e-30
"""Of a float32 below this the inverse is too near to infinity."""


def quantise_q4(weight: torch.Tensor) -> torch.Tensor:
    """float32 `[outputs, inputs]` -> Q4_1 blocks, uint8 `[outputs, inputs / 32 * 20]`. Where float16 does not hold a
    scale or minimum, it is stored as infinity or NaN: see `Packed.first_bad_row`."""
    return _by_pieces(weight, BYTES["Q4_1"], _q4)


def quantise_q8(weight: torch.Tensor) -> torch.Tensor:
    """float32 `[outputs, inputs]` -> Q8_0 blocks, uint8 `[outputs, inputs / 32 * 34]`; else as `quantise_q4`."""
    return _by_pieces(weight, BYTES["Q8_0"], _q8)


def _by_pieces(weight: torch.Tensor, size: int, kernel: Kernel) -> torch.Tensor:
    values = weight.reshape(-1, BLOCK).numpy()
    blocks = np.empty((len(values), size), dtype=np.uint8)
    step = min(_PIECE // BLOCK, len(values))
    # one room for all pieces: fresh memory for each would have to be zeroed by the system, which took longer than the
    # arithmetic
    room = np.empty((5, BLOCK * step), dtype=np.float32)
    with np.errstate(all="ignore"):  # NaN, infinity and what is too large show in the scales
        for first in range(0, len(values), step):
            part = values[first : first + step]
            # a block is a column: what is summed or spread over a block runs over whole vectors
            piece, *scratch = room[:, : part.size].reshape(5, BLOCK, len(part))
            piece[:], at = part.T, 0
            for found in kernel(piece, scratch):
                blocks[first : first + step, at : at + len(found)] = found.T
                at += len(found)
    return torch.from_numpy(blocks).view(len(weight), -1)


def _q8(v: Array, room: Sequence[Array]) -> Iterator[Array]:
    d = (np.abs(v, out=room[0]).max(0) / np.float32(127)).astype(np.float16)
    yield _bytes(d)
    # by the scale as it is stored: near float16's smallest, it can be half of what it was
    q = np.multiply(v, _inverse(d.astype(np.float32)), out=room[0])
    yield np.clip(np.rint(q, out=q), -127, 127, out=q).astype(np.int8).view(np.uint8)


def _q4(v: Array, room: Sequence[Array]) -> Iterator[Array]:
    above, centred, q, scratch = room
    low, mean = v.min(0), v.mean(0)
    inverse = _inverse(v.max(0) - low)
    np.subtract(v, low, out=above)
    np.subtract(v, mean, out=centred)
    d, m, best = np.zeros_like(low), mean.copy(), np.full_like(low, -1.0)
    for span in SPANS:
        np.multiply(above, inverse * np.float32(span), out=q)
        if span > LEVELS:
            q -= np.float32((span - LEVELS) / 2)
        slope, offset, explained = _fit(_whole(q), centred, mean, scratch)
        better = explained > best
        d, m, best = (np.where(better, *pair) for pair in ((slope, d), (offset, m), (explained, best)))
    d, m, _ = _fit(_steps(v, d, m, q), centred, mean, scratch)
    half = d.astype(np.float16)
    stored = half.astype(np.float32)
    # the minimum that is best for the scale as it is stored; q is then rounded with both as they are stored
    m = (m + (d - stored) * q.mean(0)).astype(np.float16)
    yield _bytes(half)
    yield _bytes(m)
    whole = _steps(v, stored, m.astype(np.float32), q).astype(np.uint8)
    yield whole[: BLOCK // 2] | whole[BLOCK // 2 :] << 4


def _fit(q: Array, centred: Array, mean: Array, scratch: Array) -> tuple[Array, Array, Array]:
    """The d and m of least squares for these q, and by how much they lower the squared error below that of m alone."""
    middle = q.mean(0)
    together = np.multiply(q, centred, out=scratch).sum(0)
    spread = np.multiply(q, q, out=scratch).sum(0) - BLOCK * middle * middle
    slope = together / np.maximum(spread, 0.25)  # of whole numbers that are not all the same it is 31 / 32 or more
    return slope, mean - slope * middle, slope * together


def _steps(v: Array, d: Array, m: Array, out: Array) -> Array:
    np.subtract(v, m, out=out)
    return _whole(np.multiply(out, _inverse(d), out=out))


def _whole(q: Array) -> Array:
    return np.clip(np.rint(q, out=q), 0, LEVELS, out=q)


def _inverse(d: Array) -> Array:
    return np.where(d > _TINY, np.float32(1) / d, np.float32(0))


def _bytes(half: Array) -> Array:
    return half.reshape(-1, 1).view(np.uint8).T
