"""From logits to tokens, on the device. Called by the runner once a step, for the rows that sample.

Only what some row asks for is computed: greedy rows take the maximum of the raw logits; noise, filters, penalties and
log-probabilities each run for the rows that have them. The noise is keyed by (seed, position), so a row's token does
not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from octavo_kernels import forbid_tokens, gumbel_sample, top_k_top_p_min_p

from octavo.decode.processors import NEVER
from octavo.decode.row import RowSampling
from octavo.execute.rows import BestLogits, highest, log_softmax, log_sums, most_likely
from octavo.execute.table import FLOATS, RowTable
from octavo.execute.transfer import to_device


@dataclass(slots=True)
class DeviceLogprobs:
    """Log-probabilities of some positions, still on the device."""

    chosen: torch.Tensor
    """[S] float32."""
    ranks: torch.Tensor
    """[S] int64, 1 is the most likely."""
    top_ids: torch.Tensor
    """[S, K] int64."""
    top: torch.Tensor
    """[S, K] float32."""


def logprobs_of(logprobs: torch.Tensor, tokens: torch.Tensor, count: int) -> DeviceLogprobs:
    """What is reported of `logprobs` [S, V]: the chosen `tokens` [S], their ranks, and the `count` most likely
    tokens."""
    chosen = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs > chosen).sum(dim=1) + 1
    top, top_ids = logprobs.topk(count, dim=1)
    return DeviceLogprobs(chosen[:, 0], ranks, top_ids, top)


@dataclass(slots=True)
class DeviceCandidates:
    """The best next tokens of R beams, still on the device."""

    tokens: torch.Tensor
    """[R, K] int64."""
    scores: torch.Tensor
    """[R, K] float32, sums of log-probabilities, the highest first."""
    rows: list[int]
    """Which of the S rows they belong to, in order."""


@dataclass(slots=True)
class Sampled:
    tokens: torch.Tensor
    """[S] int64; -1 where the logits were not finite or no token was allowed. Of beams it means nothing."""
    logprobs: DeviceLogprobs | None
    logprob_rows: list[int]
    """Which of the S rows `logprobs` belongs to, in order."""
    candidates: DeviceCandidates | None = None


@dataclass(slots=True)
class SampledRows:
    """The rows of a step that sample, S of them."""

    logits: torch.Tensor
    """[S, V]."""
    rows: torch.Tensor
    """[S] int64 device rows."""
    positions: torch.Tensor
    """[S] int64, the position which the new token will have."""
    sampling: list[RowSampling]
    host_rows: list[int]
    """`rows` and `positions`, known to the host."""
    lengths: list[int]

    def part(self, places: list[int]) -> SampledRows:
        """Some of them, in this order."""
        index = to_device(places, torch.int64, self.logits.device)
        logits, rows, positions = (t.index_select(0, index) for t in (self.logits, self.rows, self.positions))
        lists = ([values[place] for place in places] for values in (self.host_rows, self.lengths))
        return SampledRows(logits, rows, positions, [self.sampling[place] for place in places], *lists)


@dataclass(frozen=True, slots=True)
class Mask:
    """What a grammar allows next."""

    places: torch.Tensor
    """[R] int64, which of the S rows."""
    allowed: torch.Tensor
    """[R, ceil(V / 32)] int32: see `octavo_kernels.forbid_tokens`."""


def join(parts: list[tuple[list[int], Sampled]]) -> Sampled:
    """Parts of a step, each with its places, as one. One of them at most has candidates."""
    tokens = torch.cat([sampled.tokens for _, sampled in parts])
    order = [place for places, _ in parts for place in places]
    joined = torch.empty_like(tokens)
    joined[to_device(order, torch.int64, tokens.device)] = tokens
    for places, sampled in parts:
        if sampled.candidates is not None:
            sampled.candidates.rows = [places[row] for row in sampled.candidates.rows]
    candidates = next((sampled.candidates for _, sampled in parts if sampled.candidates is not None), None)
    rows = [places[row] for places, sampled in parts for row in sampled.logprob_rows]
    found = [sampled.logprobs for _, sampled in parts if sampled.logprobs is not None]
    if not found:
        return Sampled(joined, None, [], candidates)
    width = max(raw.top.shape[1] for raw in found)
    # a part may report fewer alternatives than the other: what is added is cut off where it is read
    padded = [(F.pad(raw.top_ids, (0, width - raw.top_ids.shape[1])), F.pad(raw.top, (0, width - raw.top.shape[1])))
              for raw in found]  # fmt: skip
    logprobs = DeviceLogprobs(
        torch.cat([raw.chosen for raw in found]), torch.cat([raw.ranks for raw in found]),
        torch.cat([ids for ids, _ in padded]), torch.cat([top for _, top in padded]),
    )  # fmt: skip
    return Sampled(joined, logprobs, rows, candidates)


class Sampler:
    """`never`: tokens that no row may make, whatever its parameters."""

    def __init__(self, table: RowTable, never: Sequence[int] = ()) -> None:
        self.table = table
        self._never = to_device(never, torch.int64, table.device) if never else None

    def sample(self, batch: SampledRows, mask: Mask | None = None) -> Sampled:
        logits, rows, sampling, lengths = batch.logits, batch.rows, batch.sampling, batch.lengths
        wanting = [i for i, row in enumerate(sampling) if row.logprobs is not None]
        reported = torch.log_softmax(_pick(logits, wanting), dim=-1, dtype=torch.float32) if wanting else None
        self._forbid(logits)
        if mask is None and all(row.plain and row.greedy for row in sampling):
            tokens = most_likely(logits)
        else:
            logits = logits.float().contiguous()
            if mask is not None:
                forbid_tokens(logits, mask.places, mask.allowed)
            self._process(logits, sampling, batch.host_rows, lengths)
            self._penalise(logits, rows, sampling, lengths)
            if all(row.greedy for row in sampling):
                tokens = most_likely(logits)
            else:
                temperature = self._float("temperature", rows)
                self._filter(logits, rows, sampling, temperature)
                tokens = gumbel_sample(logits, temperature, self.table.seeds.index_select(0, rows), batch.positions)
        possible = logits.gather(1, tokens[:, None])[:, 0].isfinite()
        result = Sampled(torch.where(possible, tokens, -1), None, wanting)
        if reported is not None:
            most = max(sampling[i].logprobs or 0 for i in wanting)
            result.logprobs = logprobs_of(reported, _pick(tokens, wanting), most)
        return result

    def search(self, batch: SampledRows, scores: list[float], keep: int) -> Sampled:
        """The `keep` best next tokens of beams: `scores` [S] are added to the log-probabilities of theirs. Processors
        and penalties change log-probabilities here, not logits, as in transformers' beam search."""
        if any(row.penalised for row in batch.sampling):
            values = log_softmax(batch.logits)
            self._forbid(values)
            self._process(values, batch.sampling, batch.host_rows, batch.lengths)
            self._penalise(values, batch.rows, batch.sampling, batch.lengths)
            best, tokens = highest(values, min(keep, values.shape[1]))
            return self.extend(BestLogits(best, tokens, torch.zeros(len(best), device=best.device)), scores)
        # what processors forbid or add is the same in logits, and the sum is taken off a few of them
        sums, values = log_sums(batch.logits), batch.logits
        self._forbid(values)
        if not all(row.plain for row in batch.sampling):
            values = values.float()
            self._process(values, batch.sampling, batch.host_rows, batch.lengths)
        best, tokens = highest(values, min(keep, values.shape[1]))
        return self.extend(BestLogits(best, tokens, sums), scores)

    def extend(self, best: BestLogits, scores: list[float]) -> Sampled:
        """The best next tokens of as many beams as there are `scores`, which are added to the log-probabilities of
        theirs. `best` may have more rows, of padding."""
        size = len(scores)
        logprobs = best.values[:size].float() - best.sums[:size, None]
        reached = logprobs + self.table.send(scores, torch.float32)[:, None]
        candidates = DeviceCandidates(best.tokens[:size], reached, list(range(size)))
        nothing = torch.zeros(size, dtype=torch.int64, device=reached.device)
        return Sampled(nothing, None, [], candidates)

    @property
    def forbids(self) -> bool:
        """There are tokens that no row may make."""
        return self._never is not None

    def _forbid(self, logits: torch.Tensor) -> None:
        if self._never is not None:
            logits.index_fill_(1, self._never, NEVER)

    def _process(
        self, logits: torch.Tensor, sampling: list[RowSampling], host_rows: list[int], lengths: list[int]
    ) -> None:
        for i, row in enumerate(sampling):
            for processor in row.processors:
                processor.apply(logits[i], self.table.tokens[host_rows[i]], lengths[i])

    def _penalise(
        self, logits: torch.Tensor, rows: torch.Tensor, sampling: list[RowSampling], lengths: list[int]
    ) -> None:
        chosen = [i for i, row in enumerate(sampling) if row.penalised]
        if not chosen:
            return
        send = self.table.send
        index = send(chosen, torch.int64)
        rows = rows.index_select(0, index)
        longest = max(lengths[i] for i in chosen)
        history = self.table.tokens[:, :longest].index_select(0, rows).long()
        place = torch.arange(longest, device=history.device)
        known = place < send([lengths[i] for i in chosen], torch.int64)[:, None]
        made = known & (place >= send([sampling[i].num_prompt for i in chosen], torch.int64)[:, None])
        part = logits.index_select(0, index)
        counts = torch.zeros_like(part).scatter_add_(1, history, made.to(part.dtype))
        seen = torch.zeros_like(part).scatter_add_(1, history, known.to(part.dtype)) > 0
        repetition = self._float("repetition_penalty", rows)[:, None]
        part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
        part -= self._float("frequency_penalty", rows)[:, None] * counts
        part -= self._float("presence_penalty", rows)[:, None] * (counts > 0)
        logits.index_copy_(0, index, part)

    def _filter(
        self, logits: torch.Tensor, rows: torch.Tensor, sampling: list[RowSampling], temperature: torch.Tensor
    ) -> None:
        chosen = [i for i, row in enumerate(sampling) if row.filtered]
        if not chosen:
            return
        index = self.table.send(chosen, torch.int64)
        rows = rows.index_select(0, index)
        part = logits.index_select(0, index)
        top_k, top_p, min_p = (
            self.table.top_k.index_select(0, rows),
            self._float("top_p", rows),
            self._float("min_p", rows),
        )
        top_k_top_p_min_p(part, temperature.index_select(0, index), top_k, top_p, min_p)
        logits.index_copy_(0, index, part)

    def _float(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.table.floats[:, FLOATS.index(name)].index_select(0, rows)


def _pick(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if len(rows) == len(values):
        return values
    return values.index_select(0, to_device(rows, torch.int64, values.device))
