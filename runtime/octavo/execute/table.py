"""Device rows: what the device knows of each running sequence. A step sends only what changed.

A row keeps the tokens (prompt and output: sampled tokens are written here on the device, and read from here as the next
input), the block table, and the sampling parameters as numbers. The scheduler gives out the row numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from octavo_kernels import step_inputs

from octavo.attention.cpu import KV_PAD
from octavo.decode.row import RowSampling
from octavo.engine.plan import StepPlan
from octavo.execute.context import KVCache, StepInputs
from octavo.execute.rows import host_step_inputs
from octavo.execute.transfer import to_device

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


class RowTable:
    """`rows` rows of up to `max_len` tokens."""

    def __init__(self, rows: int, max_len: int, block_size: int, vocab_size: int, device: torch.device) -> None:
        self.device, self.block_size, self.vocab_size = device, block_size, vocab_size
        self._step_inputs = host_step_inputs if device.type == "cpu" else step_inputs
        # room to round the keys up to whole tiles; entries beyond a sequence's blocks stay 0, the null block
        max_blocks = -(-(-(-max_len // KV_PAD) * KV_PAD) // block_size)
        self.tokens = torch.zeros(rows, max_len + 1, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
        self.floats = torch.zeros(rows, len(FLOATS), dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.sampling: list[RowSampling | None] = [None] * rows

    def send(self, values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        """A small host list as a device tensor, without waiting for the device."""
        return to_device(values, dtype, self.device)

    def apply(self, plan: StepPlan, kv: KVCache, *, blocks: bool = True) -> None:
        """Take over a plan's changes: copied blocks, new rows, tokens, and new blocks
        unless something else enters them."""
        if plan.copies:
            pairs = self.send([block for pair in plan.copies for block in pair], torch.int64).view(-1, 2)
            kv.copy_blocks(pairs[:, 0], pairs[:, 1])
        if plan.new_rows:
            rows = self.send([new.row for new in plan.new_rows], torch.int64)
            floats = [float(getattr(new.params, name)) for new in plan.new_rows for name in FLOATS]
            self.floats.index_copy_(0, rows, self.send(floats, torch.float32).view(-1, len(FLOATS)))
            self.top_k.index_copy_(0, rows, self.send([max(new.params.top_k, 0) for new in plan.new_rows], torch.int32))
            self.seeds.index_copy_(0, rows, self.send([new.seed for new in plan.new_rows], torch.int64))
            self.block_table.index_fill_(0, rows, 0)
            for new in plan.new_rows:
                self.tokens[new.row, : len(new.tokens)] = self.send(new.tokens, torch.int32)
                self.sampling[new.row] = RowSampling.of(new, self.vocab_size, self.device)
        if blocks and plan.new_blocks:
            update = self.send([value for entry in plan.new_blocks for value in entry], torch.int64).view(-1, 3)
            self.block_table.index_put_((update[:, 0], update[:, 1]), update[:, 2].to(torch.int32))
        if plan.tokens:
            chosen = self.send([value for entry in plan.tokens for value in entry], torch.int64).view(-1, 3)
            self.tokens.index_put_((chosen[:, 0], chosen[:, 1]), chosen[:, 2].to(torch.int32))

    def gather(self, plan: StepPlan, padded: Callable[[int], int]) -> StepInputs:
        """Device inputs of a step, with as many tokens as `padded` says for those that there are."""
        steps = plan.steps
        counts = [step.count for step in steps]
        lengths = [step.start + step.count for step in steps]
        query_start = [0]
        for count in counts:
            query_start.append(query_start[-1] + count)
        size = len(steps)
        packed = self.send(
            [step.row for step in steps] + [step.start for step in steps] + lengths + query_start, torch.int32
        )
        rows, starts, seq_lens, query = torch.split(packed, [size, size, size, size + 1])
        total = padded(query_start[-1])
        input_ids, positions, slots = self._step_inputs(
            rows, starts, query, self.tokens, self.block_table, self.block_size, total=total
        )
        return StepInputs(
            input_ids, positions, slots, rows, query, seq_lens, self.block_table, self.block_size,
            [step.row for step in steps], counts, lengths, sum(count == 1 for count in counts), max(counts),
            max(lengths),
        )  # fmt: skip
