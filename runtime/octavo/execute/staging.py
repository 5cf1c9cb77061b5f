"""The numbers that a step sends to the device, and those that it gets back, in buffers that never move.

A captured graph reads its inputs from fixed addresses. All integers of a step lie in one buffer of the host's pinned
memory and go over in one copy; tokens drawn and sequences found broken come back in one. Used by `graphs.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from octavo.engine.plan import StepPlan

RING = 3
"""Buffers on the host, used in turn: one is being filled, one copied, one (of the step before) read."""


class Staging:
    """Room for steps of up to `rows` sequences and `blocks` new blocks. The names are those of the parts, each int32 on
    the device."""

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        sizes = {
            "rows": rows, "starts": rows, "lengths": rows, "query_start": rows + 1,
            "drawn_rows": rows, "drawn_positions": rows, "drawn_tokens": rows,
            "block_rows": blocks, "block_columns": blocks, "blocks": blocks, "shared_parts": 1,
        }  # fmt: skip
        ends = [0, *accumulate(sizes.values())]
        self._places = {name: slice(*ends[at : at + 2]) for at, name in enumerate(sizes)}
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(ends[-1], dtype=torch.int32, pin_memory=pinned) for _ in range(RING)]
        self._device = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        self._back = [torch.zeros(2, rows, dtype=torch.int32, pin_memory=pinned) for _ in range(RING)]
        self.results = torch.zeros(2, rows, dtype=torch.int32, device=device)
        """Tokens drawn; sequences that are broken."""
        self.rows, self.blocks = rows, blocks
        self._turn = 0

    def part(self, name: str, size: int) -> torch.Tensor:
        """The first `size` numbers of a part, on the device."""
        place = self._places[name]
        return self._device[place.start : place.start + size]

    def send(self, plan: StepPlan, entries: int, drawing: Sequence[int], draws: int, shared_parts: int) -> None:
        """Begin to copy a step padded to `entries` sequences, of which those at `drawing` draw a token, padded to
        `draws`. The plan's new blocks are among them, unless there are more than `blocks`."""
        self._turn = (self._turn + 1) % RING
        host = self._hosts[self._turn].numpy()
        steps, size = plan.steps, len(plan.steps)

        def put(name: str, values: Sequence[int] | np.ndarray, padded: int, padding: int) -> None:
            at = self._places[name].start
            host[at : at + len(values)] = values
            host[at + len(values) : at + padded] = padding

        numbers = np.array([(step.row, step.start, step.count) for step in steps], dtype=np.int32).T
        lengths = numbers[1] + numbers[2]
        ends = numbers[2].cumsum()
        put("rows", numbers[0], entries, 0)
        put("starts", numbers[1], entries, 0)
        put("lengths", lengths, entries, 0)
        host[self._places["query_start"].start] = 0
        at = self._places["query_start"].start + 1
        host[at : at + size] = ends
        host[at + size : at + entries] = ends[-1]  # padding has no tokens
        chosen = slice(None) if len(drawing) == size else list(drawing)
        put("drawn_rows", numbers[0][chosen], draws, -1)
        put("drawn_positions", lengths[chosen], draws, 0)
        put("drawn_tokens", ends[chosen] - 1, draws, 0)
        entered = plan.new_blocks if len(plan.new_blocks) <= self.blocks else []
        updates = np.array(entered, dtype=np.int32).reshape(-1, 3).T
        for name, values in zip(("block_rows", "block_columns", "blocks"), updates, strict=True):
            put(name, values, self.blocks, -1)
        host[self._places["shared_parts"]] = shared_parts
        self._device.copy_(self._hosts[self._turn], non_blocking=True)

    def fetch(self) -> torch.Tensor:
        """Begin to copy `results` to the host; valid once the device is through, until two more steps were sent."""
        return self._back[self._turn].copy_(self.results, non_blocking=True)
