"""A step under way, and its results on the host. The only place that waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from octavo.decode.beam import Candidates
from octavo.decode.sampler import DeviceLogprobs, Sampled
from octavo.engine.request import BeamEvent, RawLogprobs, TokenEvent
from octavo.errors import RequestFailedError

CPU = torch.device("cpu")


@dataclass(slots=True)
class StepResult:
    """`Launched` of the engine's loop. Copies to the host begin when it is made; `wait` finishes them."""

    size: int
    """Entries of the plan's `steps`."""
    sampled: Sampled | None
    sampling: list[int]
    """Which entries sampled, in order."""
    broken: torch.Tensor
    """[size], bool or 0 and 1: the model's output for this entry was not finite."""
    prompt_logprobs: dict[int, DeviceLogprobs] = field(default_factory=dict)
    """By entry."""
    device: torch.device = CPU
    _copied: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        if self.device.type != "cuda":
            return
        self.broken = _begin_copy(self.broken)
        logprobs = list(self.prompt_logprobs.values())
        if self.sampled is not None:
            self.sampled.tokens = _begin_copy(self.sampled.tokens)
            logprobs += [self.sampled.logprobs] if self.sampled.logprobs is not None else []
            if (found := self.sampled.candidates) is not None:
                found.tokens, found.scores = _begin_copy(found.tokens), _begin_copy(found.scores)
        for raw in logprobs:
            raw.chosen, raw.ranks = _begin_copy(raw.chosen), _begin_copy(raw.ranks)
            raw.top, raw.top_ids = _begin_copy(raw.top), _begin_copy(raw.top_ids)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def wait(self) -> list[TokenEvent | None]:
        if self._copied is not None:
            self._copied.synchronize()
        events: list[TokenEvent | None] = [None] * self.size
        for entry, raw in self.prompt_logprobs.items():
            events[entry] = TokenEvent(0, prompt_logprobs=_to_host(raw))
        if self.sampled is not None:
            tokens = self.sampled.tokens.tolist()
            logprobs = dict(zip(self.sampled.logprob_rows, _to_host(self.sampled.logprobs), strict=True))
            for number, entry in enumerate(self.sampling):
                event = events[entry] or TokenEvent(0)
                if tokens[number] < 0:
                    event.error = RequestFailedError(
                        "no token could be chosen: no logit is finite, or the request forbids every token"
                    )
                event.token_ids = [tokens[number]]
                event.logprobs = [logprobs[number]] if number in logprobs else None
                events[entry] = event
            self._candidates(events)
        for entry, broken in enumerate(self.broken.tolist()):
            if broken:
                events[entry] = TokenEvent(0, error=RequestFailedError("the model's output was not finite"))
        return events

    def _candidates(self, events: list[TokenEvent | None]) -> None:
        """Beams have candidates instead of a token."""
        found = self.sampled.candidates if self.sampled is not None else None
        if found is not None:
            for number, tokens, scores in zip(found.rows, found.tokens.tolist(), found.scores.tolist(), strict=True):
                events[self.sampling[number]] = BeamEvent(0, candidates=Candidates(tokens, scores))


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor  # its copy is under way already
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _to_host(raw: DeviceLogprobs | None) -> list[RawLogprobs]:
    if raw is None:
        return []
    columns = zip(raw.chosen.tolist(), raw.ranks.tolist(), raw.top_ids.tolist(), raw.top.tolist(), strict=True)
    return [RawLogprobs(*column) for column in columns]
