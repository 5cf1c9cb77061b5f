"""The device's side of encoder-decoders: encodes the sources of a step, then runs its decoder, which attends to
them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from octavo.attention.base import AttentionBackend
from octavo.attention.texts import TextBatch
from octavo.engine.plan import NewRow, NewSource, StepPlan
from octavo.execute.context import ForwardContext, KVCache, StepInputs
from octavo.execute.model import Model
from octavo.execute.rows import BestLogits
from octavo.execute.runner import Runner
from octavo.execute.table import RowTable
from octavo.execute.transfer import array_to_device, to_device


class Seq2SeqModel(Model, Protocol):
    """An encoder beside the decoder that `Model` describes."""

    positions_skip_padding: int | None
    """The padding token, where positions of a source leave it out (see `TextBatch`)."""
    dtype: torch.dtype

    def encode(self, batch: TextBatch) -> torch.Tensor:
        """States of all tokens of the sources, `[T, hidden]`."""

    def best(self, hidden: torch.Tensor, count: int) -> BestLogits:
        """The highest of what `logits` would give."""

    def remember(self, encoded: torch.Tensor, kv: KVCache, slots: torch.Tensor) -> None:
        """Write the keys and values of `encoded` for cross-attention, of all layers, to `slots` `[T]`."""


class SourceTable:
    """Which blocks the source of each row has."""

    def __init__(self, rows: int, max_source: int, block_size: int, row_tokens: int, device: torch.device) -> None:
        """`row_tokens`: what the attention rounds lengths up to."""
        padded = -(-max_source // row_tokens) * row_tokens
        self.block_size, self.device = block_size, device
        self.blocks = torch.zeros(rows, -(-padded // block_size), dtype=torch.int32, device=device)
        self.lengths = [0] * rows
        self.names = [0] * rows
        """A source's first block: equal for rows that read the same one."""

    def apply(self, new_rows: Sequence[NewRow]) -> None:
        places = [(new.row, new.source) for new in new_rows if new.source is not None]
        if not places:
            return
        wide = np.zeros((len(places), self.blocks.shape[1]), dtype=np.int32)
        for entry, (row, source) in enumerate(places):
            wide[entry, : len(source.blocks)] = source.blocks
            self.lengths[row], self.names[row] = source.length, source.blocks[0]
        rows = to_device([row for row, _ in places], torch.int64, self.device)
        self.blocks.index_copy_(0, rows, array_to_device(wide, self.device))

    def gather(self, inputs: StepInputs) -> StepInputs:
        """The step as its cross-attention sees it: every token a sequence of one query, which stands at the end of its
        source and so sees all of it."""
        rows = np.repeat(np.array(inputs.host_rows, dtype=np.int32), inputs.counts)
        lengths = np.array(self.lengths, dtype=np.int32)[rows]
        tokens, device = len(rows), self.device
        host = np.concatenate([rows, lengths, np.arange(tokens + 1, dtype=np.int32)])
        device_rows, seq_lens, query_start = torch.split(array_to_device(host, device), [tokens, tokens, tokens + 1])
        positions = torch.zeros_like(inputs.positions)
        positions[:tokens] = seq_lens - 1
        return StepInputs(
            inputs.input_ids, positions, inputs.slots, device_rows, query_start, seq_lens, self.blocks,
            self.block_size, rows.tolist(), [1] * tokens, lengths.tolist(), tokens, 1, int(lengths.max()),
        )  # fmt: skip


class Seq2SeqRunner(Runner):
    model: Seq2SeqModel

    def __init__(
        self, model: Seq2SeqModel, kv: KVCache, table: RowTable, attention: AttentionBackend, sources: SourceTable,
        never: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(model, kv, table, attention, never)
        self.sources = sources

    def _context(self, plan: StepPlan, inputs: StepInputs) -> ForwardContext:
        if plan.sources:
            self._encode(plan.sources)
        self.sources.apply(plan.new_rows)
        cross = self.sources.gather(inputs)
        prepared = self.attention.prepare_cross(cross, [self.sources.names[row] for row in cross.host_rows])
        return ForwardContext(inputs, self.attention.prepare(inputs), self.kv, prepared)

    def _best(self, states: torch.Tensor, count: int) -> BestLogits:
        return self.model.best(states, count)

    def _encode(self, sources: Sequence[NewSource]) -> None:
        size = self.sources.block_size
        slots = np.concatenate([_slots(source, size) for source in sources])
        batch = TextBatch(
            [source.ids for source in sources], pad_token_id=self.model.positions_skip_padding, dtype=self.model.dtype,
            device=self.table.device,
        )  # fmt: skip
        self.model.remember(self.model.encode(batch), self.kv, array_to_device(slots, self.table.device))


def _slots(source: NewSource, size: int) -> np.ndarray:
    places = np.arange(len(source.ids))
    return np.array(source.blocks, dtype=np.int64)[places // size] * size + places % size
