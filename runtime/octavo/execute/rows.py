"""What a step asks of rows of states and logits. Used by the runner and the sampler.

On the CPU in float32, numpy does it on the engine's own thread: torch would wake its other threads, which then spin for
milliseconds on the cores that the next program runs on. The largest of 64 rows of 49152 logits takes 0.2 ms instead of
1.3 (`benchmarks/cpu_program.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SPAN = 512
"""Of 128 rows of 256206 bfloat16 logits the largest of each 512 take 5 ms, of each 128 21 ms."""


def _on_host(values: torch.Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32


def not_finite(states: torch.Tensor) -> torch.Tensor:
    """[T, hidden] -> [T] bool: some value is NaN or infinite."""
    if _on_host(states):
        array = states.numpy()
        return torch.from_numpy(~(abs(array).max(axis=-1) < float("inf")))  # a NaN makes the maximum NaN
    return states.isfinite().all(dim=-1).logical_not_()


def take(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[T, hidden], [S] int64 -> [S, hidden]."""
    if _on_host(states):
        return torch.from_numpy(states.numpy().take(rows.numpy(), axis=0))
    return states.index_select(0, rows)


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """[S, V] -> [S] int64, the first of equals. `max` instead of `argmax`: 1.3 ms against 5.7 for 64 rows of 49152
    bfloat16 logits on the CPU."""
    if _on_host(logits):
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.max(dim=-1).indices


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """[S, V] -> [S, V] float32. On the CPU row by row: several at once, torch would share out among its threads."""
    if logits.device.type != "cpu":
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    result = torch.empty(logits.shape, dtype=torch.float32)
    for row, out in zip(logits, result, strict=True):
        torch.log_softmax(row, dim=0, dtype=torch.float32, out=out)
    return result


def log_sums(logits: torch.Tensor) -> torch.Tensor:
    """[S, V] -> [S] float32: what `log_softmax` takes off each row. On the CPU one row is in float32 at a time, and
    numpy works on it: 128 rows of 256206 bfloat16 logits take 40 ms, `log_softmax` row by row 580 on cores that others
    use too, because operators that are shared out among threads then wait for each other."""
    if logits.device.type != "cpu":
        return torch.logsumexp(logits.float(), dim=-1)
    if logits.dtype != torch.bfloat16:
        logits = logits.float()
    size = logits.shape[1]
    work, sums = np.empty(size, dtype=np.float32), np.empty(len(logits), dtype=np.float32)
    whole = _on_host(logits)
    rows = logits.numpy() if whole else logits.contiguous().view(torch.int16).numpy().view(np.uint16)
    for number, row in enumerate(rows):
        if not whole:  # a bfloat16 is the upper half of a float32
            np.left_shift(row, 16, out=work.view(np.uint32), dtype=np.uint32)
            row = work
        top = row.max()
        with np.errstate(invalid="ignore"):  # of a row that is broken, which is found elsewhere
            np.subtract(row, top, out=work)
            sums[number] = top + np.log(np.exp(work, out=work).sum())
    return torch.from_numpy(sums)


def highest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, V] -> the highest `count` of each row in order, [S, count], and their places. On the CPU the largest of each
    `SPAN` first: the highest lie in the `count` spans that have the largest. 128 rows of 256206 take 7 ms on 2 cores in
    bfloat16, `topk` 43."""
    spans = values.shape[1] // SPAN
    if values.device.type != "cpu" or spans <= count:
        best, places = values.topk(count, dim=1)
        return best, places
    if _on_host(values):
        rows = [_highest_of(row, count) for row in values.numpy()]
        return torch.from_numpy(np.stack([row for row, _ in rows])), torch.from_numpy(np.stack([at for _, at in rows]))
    whole = values[:, : spans * SPAN].view(len(values), spans, SPAN)
    chosen = whole.amax(dim=2).topk(count, dim=1).indices[:, :, None]
    found = whole.gather(1, chosen.expand(-1, -1, SPAN)).flatten(1)
    at = (chosen * SPAN + torch.arange(SPAN)).flatten(1)
    rest = torch.arange(spans * SPAN, values.shape[1]).expand(len(values), -1)
    best, places = torch.cat([found, values[:, spans * SPAN :]], dim=1).topk(count, dim=1)
    return best, torch.cat([at, rest], dim=1).gather(1, places)


@dataclass(slots=True)
class BestLogits:
    """The highest logits of S rows."""

    values: torch.Tensor
    """[S, K], in order."""
    tokens: torch.Tensor
    """[S, K] int64."""
    sums: torch.Tensor
    """[S] float32: taken off, it makes log-probabilities of them."""


def best_of(logits: torch.Tensor, count: int) -> BestLogits:
    """[S, V] -> the highest `count` of each row."""
    values, tokens = highest(logits, min(count, logits.shape[1]))
    return BestLogits(values, tokens, log_sums(logits))


def _highest_of(row: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    spans = len(row) // SPAN
    largest = row[: spans * SPAN].reshape(spans, SPAN).max(axis=1)
    chosen = np.argpartition(largest, spans - count)[spans - count :]
    at = np.concatenate([(chosen[:, None] * SPAN + np.arange(SPAN)).ravel(), np.arange(spans * SPAN, len(row))])
    found = row[at]
    order = np.argpartition(found, len(found) - count)[len(found) - count :]
    order = order[np.argsort(-found[order], kind="stable")]
    return found[order], at[order]


def copy_columns(table: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """[N, C, ...] integers: copy columns over others. All are read before any is written."""
    if table.device.type != "cpu":
        table.index_copy_(1, destinations, table.index_select(1, sources))
        return
    columns = table.numpy().swapaxes(0, 1)
    columns[destinations.numpy()] = columns[sources.numpy()]


def host_step_inputs(
    rows: torch.Tensor, starts: torch.Tensor, query_start: torch.Tensor, tokens: torch.Tensor,
    block_table: torch.Tensor, block_size: int, *, total: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`octavo_kernels.step_inputs` for tables on the CPU, where every sequence has a token at least. In the loop of one
    request, 0.12 ms instead of 0.22."""
    row, start, ends = rows.numpy(), starts.numpy(), query_start.numpy()
    real = int(ends[-1])
    position = start
    if real > len(row):  # somebody has more than one token
        counts = np.diff(ends)
        row = np.repeat(row, counts)
        position = np.arange(real) + np.repeat(start - ends[:-1], counts)
    block, offset = np.divmod(position, block_size)
    slot = block_table.numpy()[row, block].astype(np.int64) * block_size + offset
    ids = tokens.numpy()[row, position]
    return _padded(ids, total, 0), _padded(position, total, 0), _padded(slot, total, -1)


def _padded(values: np.ndarray, total: int, padding: int) -> torch.Tensor:
    padded = np.full(total, padding, dtype=np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
