"""Has the kernels of a GPU compiled before the first request, so that no request waits for a compiler.

An encoder-decoder's steps run operator by operator, so they are rehearsed here (called by `seq2seq`); those of other
models are recorded, which rehearses them (`graphs`). Without it the first sentence took 8 s on an H100 with an empty
cache of kernels, and the first batch another 3 s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from octavo_kernels import forbid_tokens, gumbel_sample, step_inputs, tiles, top_k_top_p_min_p
from octavo_kernels.ahead import compiled_ahead

from octavo.attention.texts import TextBatch
from octavo.execute.context import ForwardContext, StepInputs
from octavo.execute.table import RowTable

if TYPE_CHECKING:
    from octavo.execute.sources import Seq2SeqRunner


def choose_in_every_way(table: RowTable) -> None:
    """The kernels by which requests ask for tokens to be chosen."""
    device, vocabulary = table.device, table.vocab_size
    for rows in (1, 2):
        logits, ones = torch.zeros(rows, vocabulary, device=device), torch.ones(rows, device=device)
        longs = torch.zeros(rows, dtype=torch.int64, device=device)
        top_k_top_p_min_p(logits, ones, longs.to(torch.int32), ones, ones)
        gumbel_sample(logits, ones, longs, longs)
        forbid_tokens(logits, longs, torch.zeros(rows, -(-vocabulary // 32), dtype=torch.int32, device=device))


@torch.inference_mode()
def rehearse(runner: Seq2SeqRunner, kv_heads: int, max_len: int) -> None:
    """Steps of every kind, whose own kernels are noted and then compiled side by side; none of them runs. The other
    operators run on zeros, and load what they need. No key and no value is written."""
    model, table, attention = runner.model, runner.table, runner.attention
    many = -(-tiles.MANY_PROGRAMS // kv_heads)
    with compiled_ahead():
        # few sequences and many, in one piece and in several; and some with two new tokens
        for entries, each, longest in (
            (1, 1, 1), (1, 1, tiles.FEW_SPLIT + 1), (many, 1, 1), (many, 1, tiles.MANY_SPLIT + 1), (1, 2, 2),
        ):  # fmt: skip
            if longest > max(max_len, 2):
                continue
            own = _step(entries, each, longest, table.block_table, table)
            source = _step(entries * each, 1, longest, runner.sources.blocks, table)
            cross = attention.prepare_cross(source, [])
            hidden = model.forward(ForwardContext(own, attention.prepare(own), runner.kv, cross))
            step_inputs(
                own.rows, own.rows, own.query_start, table.tokens, table.block_table, table.block_size,
                total=entries * each,
            )  # fmt: skip
            model.best(hidden, 2)
        choose_in_every_way(table)
        skipped = model.positions_skip_padding
        model.encode(TextBatch([[0], [0, 0]], pad_token_id=skipped, dtype=model.dtype, device=table.device))


def _step(entries: int, each: int, longest: int, blocks: torch.Tensor, table: RowTable) -> StepInputs:
    """Of so many sequences with `each` new tokens. On the host there are none, so that nothing is written for them."""
    longs = torch.zeros(entries * each, dtype=torch.int64, device=table.device)
    ints = torch.zeros(entries + 1, dtype=torch.int32, device=table.device)
    return StepInputs(
        longs, longs, longs, ints[:-1], ints, ints[:-1], blocks, table.block_size, host_rows=[], counts=[], lengths=[],
        num_decodes=0, max_query_len=each, max_seq_len=longest,
    )  # fmt: skip
