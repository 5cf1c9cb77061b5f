"""The runner of devices on which launching costs more than computing: steps are replayed where a graph fits.

Same loop, same plans, same results as `Runner`, whose way of sampling still serves requests that ask for more than a
temperature.
"""

from __future__ import annotations

import torch

from octavo.attention.base import AttentionBackend
from octavo.decode.sampler import Sampled
from octavo.engine.plan import Masks, StepPlan
from octavo.execute.context import KVCache
from octavo.execute.graphs import StepGraphs
from octavo.execute.model import Model
from octavo.execute.result import StepResult
from octavo.execute.runner import Runner
from octavo.execute.table import RowTable


class GraphedRunner(Runner):
    """`graphs` are captured already."""

    def __init__(
        self, model: Model, kv: KVCache, table: RowTable, attention: AttentionBackend, graphs: StepGraphs
    ) -> None:
        super().__init__(model, kv, table, attention)
        self.graphs = graphs

    @torch.inference_mode()
    def launch(self, plan: StepPlan, masks: Masks) -> StepResult:
        size = len(plan.steps)
        sampling = [entry for entry, step in enumerate(plan.steps) if step.samples]
        self.table.apply(plan, self.kv, blocks=not self.graphs.fits(plan))
        rows = self._sampling([plan.steps[entry].row for entry in sampling])
        hidden = self.graphs.forward(plan, sampling)
        simple = all(row.plain and not row.filtered and row.logprobs is None for row in rows)
        drawn = simple and not plan.masked and not plan.searched
        sampled = None
        if sampling and drawn:
            self.graphs.draw(len(sampling))
        elif sampling:
            sampled = self._sample(plan, hidden, sampling, masks)
        prompt_logprobs = self._prompt_logprobs(plan, hidden)
        tokens, broken = self.graphs.staging.fetch()
        if sampling and drawn:
            sampled = Sampled(tokens[: len(sampling)], None, [])
        return StepResult(size, sampled, sampling, broken[:size], prompt_logprobs, self.table.device)
