"""One step on the device: forward, sample, begin the copy to the host. Nothing here waits for the device.

The runner sees plans and rows, never requests; the model sees token ids, positions and the `ForwardContext`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F

from octavo.attention.base import AttentionBackend
from octavo.decode.row import RowSampling
from octavo.decode.sampler import DeviceLogprobs, Mask, Sampled, SampledRows, Sampler, join, logprobs_of
from octavo.engine.plan import Masks, SearchedStep, StepPlan
from octavo.execute.context import ForwardContext, KVCache, StepInputs
from octavo.execute.model import Model
from octavo.execute.result import StepResult
from octavo.execute.rows import BestLogits, best_of, not_finite, take
from octavo.execute.table import RowTable
from octavo.execute.transfer import array_to_device

PROMPT_LOGPROB_TILE = 256
"""Prompt positions whose logits are held at once: [256, V] float32 is 50 MB at V = 49152."""


class Runner:
    """`never`: tokens that it never makes."""

    def __init__(
        self, model: Model, kv: KVCache, table: RowTable, attention: AttentionBackend, never: Sequence[int] = ()
    ) -> None:
        self.model, self.kv, self.table, self.attention = model, kv, table, attention
        self.sampler = Sampler(table, never)
        self.waits_for_masks = table.device.type != "cpu"
        """Steps overlap, so the masks of one wait for the tokens of the step before."""

    @torch.inference_mode()
    def launch(self, plan: StepPlan, masks: Masks) -> StepResult:
        self.table.apply(plan, self.kv)
        inputs = self.table.gather(plan, self.attention.padded)
        hidden = self.model.forward(self._context(plan, inputs))
        broken = _broken(inputs, hidden)
        sampling = [entry for entry, step in enumerate(plan.steps) if step.samples]
        return StepResult(
            size=len(plan.steps),
            sampled=self._sample(plan, hidden, sampling, masks) if sampling else None,
            sampling=sampling,
            broken=broken,
            prompt_logprobs=self._prompt_logprobs(plan, hidden),
            device=self.table.device,
        )

    def _context(self, plan: StepPlan, inputs: StepInputs) -> ForwardContext:
        return ForwardContext(inputs, self.attention.prepare(inputs), self.kv)

    def _sample(self, plan: StepPlan, hidden: torch.Tensor, sampling: list[int], masks: Masks) -> Sampled:
        table, steps = self.table, plan.steps
        ends = list(accumulate(step.count for step in steps))
        host_rows = [steps[entry].row for entry in sampling]
        lengths = [steps[entry].start + steps[entry].count for entry in sampling]
        last = [ends[entry] - 1 for entry in sampling]
        size = len(sampling)
        padding = self.attention.padded(size) - size
        packed = table.send([*host_rows, *lengths, *last, *last[:1] * padding], torch.int64)
        rows, positions, chosen = torch.split(packed, [size, size, size + padding])
        states, asked = take(hidden, chosen), self._sampling(host_rows)
        if len(plan.searched) == size and not self.sampler.forbids and all(row.plain for row in asked):
            best = self._best(states, max(step.keep for step in plan.searched))
            return self.sampler.extend(best, [step.score for step in plan.searched])
        batch = SampledRows(self.model.logits(states)[:size], rows, positions, asked, host_rows, lengths)
        under_grammar = set(plan.masked)
        masked = [place for place, entry in enumerate(sampling) if entry in under_grammar]
        if plan.searched:
            sampled = self._search(batch, sampling, plan.searched, masked, masks)
        else:
            sampled = self._draw(batch, masked, masks)
        table.tokens.index_put_((rows, positions), sampled.tokens.clamp_min(0).to(torch.int32))
        return sampled

    def _best(self, states: torch.Tensor, count: int) -> BestLogits:
        return best_of(self.model.logits(states), count)

    def _search(
        self, batch: SampledRows, sampling: list[int], searched: tuple[SearchedStep, ...], masked: list[int],
        masks: Masks,
    ) -> Sampled:  # fmt: skip
        """Candidates for the beams, tokens for the others."""
        place_of = {entry: place for place, entry in enumerate(sampling)}
        beams = [place_of[step.entry] for step in searched]
        scores, keep = [step.score for step in searched], max(step.keep for step in searched)
        others = sorted(set(range(len(sampling))) - set(beams))
        if not others:
            return self.sampler.search(batch, scores, keep)
        drawn = self._draw(batch.part(others), [others.index(place) for place in masked], masks)
        return join([(others, drawn), (beams, self.sampler.search(batch.part(beams), scores, keep))])

    def _draw(self, batch: SampledRows, masked: list[int], masks: Masks) -> Sampled:
        """Rows under a grammar come last: the others need not wait for the masks."""
        if not masked:
            return self.sampler.sample(batch)
        others = sorted(set(range(len(batch.lengths))) - set(masked))
        if not others or not self.waits_for_masks:
            return self.sampler.sample(batch, self._mask(masked, masks))
        first = self.sampler.sample(batch.part(others))
        then = self.sampler.sample(batch.part(masked), self._mask(list(range(len(masked))), masks))
        return join([(others, first), (masked, then)])

    def _mask(self, places: list[int], masks: Masks) -> Mask:
        everything = np.full(-(-self.table.vocab_size // 32), -1, dtype=np.int32)
        allowed = np.stack([everything if mask is None else mask for mask in masks()])
        return Mask(self.table.send(places, torch.int64), array_to_device(allowed, self.table.device))

    def _sampling(self, rows: list[int]) -> list[RowSampling]:
        return [sampling for row in rows if (sampling := self.table.sampling[row]) is not None]

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> dict[int, DeviceLogprobs]:
        found: dict[int, DeviceLogprobs] = {}
        first = 0
        for entry, step in enumerate(plan.steps):
            if step.prompt_logprobs is not None:
                row = self.table.sampling[step.row]
                assert row is not None
                count = min(step.count, row.num_prompt - 1 - step.start)
                targets = self.table.tokens[step.row, step.start + 1 : step.start + 1 + count].long()
                tiles = []
                for begin in range(0, count, PROMPT_LOGPROB_TILE):
                    end = min(begin + PROMPT_LOGPROB_TILE, count)
                    logits = self.model.logits(hidden[first + begin : first + end])
                    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
                    tiles.append(logprobs_of(logprobs, targets[begin:end], step.prompt_logprobs))
                names = ("chosen", "ranks", "top_ids", "top")
                found[entry] = DeviceLogprobs(*(torch.cat([getattr(tile, name) for tile in tiles]) for name in names))
            first += step.count
        return found


def _broken(inputs: StepInputs, hidden: torch.Tensor) -> torch.Tensor:
    """[B] bool: some state of this step is not finite. Asked of every step, not only of those that sample: keys and
    values of a broken chunk must be found out before anybody else gets their blocks."""
    bad = not_finite(hidden)
    if inputs.max_query_len == 1:
        return bad[: len(inputs.counts)]
    before = F.pad(bad.cumsum(0), (1, 0)).index_select(0, inputs.query_start)
    return before[1:] > before[:-1]
