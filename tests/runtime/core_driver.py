"""Runs an `EngineCore` step by step in the test's own thread, and keeps tokens, ends and the logits of every token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from typing import Any

import torch
from octavo import SamplingParams
from octavo.decode.sampler import Mask, SampledRows
from octavo.engine.core import EngineCore
from octavo.engine.request import BeamEvent, RawLogprobs, Request, TokenEvent

_numbers = itertools.count()
Key = tuple[str, int]


class Driver:
    """`tokens`, `finish`, `errors`, `logprobs`, `scores`: by (request id, index). `logits`: also by position, if
    `record`."""

    def __init__(self, core: EngineCore, *, record: bool = False) -> None:
        self.core = core
        self.tokens: dict[Key, list[int]] = {}
        self.finish: dict[Key, str] = {}
        self.scores: dict[Key, float] = {}
        self.errors: dict[Key, BaseException] = {}
        self.logprobs: dict[Key, list[RawLogprobs]] = {}
        self.prompt_logprobs: dict[Key, list[RawLogprobs]] = {}
        self.logits: dict[Key, dict[int, torch.Tensor]] = {}
        if record:
            self._sample = core.runner.sampler.sample  # type: ignore[attr-defined]
            core.runner.sampler.sample = self._record  # type: ignore[attr-defined]

    def _record(self, batch: SampledRows, mask: Mask | None = None) -> Any:
        """Looks at the logits which the sampler is given, and passes them on."""
        by_row = {sequence.row: sequence for sequence in self.core.scheduler.running}
        for i, (row, length) in enumerate(zip(batch.host_rows, batch.lengths, strict=True)):
            sequence = by_row[row]
            key = (sequence.request.request_id, sequence.index)
            self.logits.setdefault(key, {})[length] = batch.logits[i].clone()
        return self._sample(batch, mask)

    def add(
        self, prompt: Seq[int], params: SamplingParams | None = None, *, seed: int = 0, priority: int = 0,
        eos: Seq[int] = (), source: Seq[int] | None = None, bad_words: Seq[Seq[int]] = (),
        offset: int = 0,
    ) -> Request:  # fmt: skip
        params = params or SamplingParams(temperature=0.0, max_tokens=16)
        request = Request(
            f"r{next(_numbers)}", prompt, params, lambda event: self._take(request, event),
            max_tokens=params.max_tokens or 16, eos_token_ids=eos, seed=seed, priority=priority,
            source_ids=source, bad_word_ids=bad_words, length_offset=offset,
        )  # fmt: skip
        self.core.scheduler.add(request)
        return request

    def _take(self, request: Request, event: TokenEvent) -> None:
        key = (request.request_id, event.index)
        self.tokens.setdefault(key, []).extend(event.token_ids)
        if event.logprobs is not None:
            self.logprobs.setdefault(key, []).extend(event.logprobs)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs.setdefault(key, []).extend(event.prompt_logprobs)
        if isinstance(event, BeamEvent):
            self.scores[key] = event.score
        if event.finish_reason is not None:
            self.finish[key] = event.finish_reason
        if event.error is not None:
            self.errors[key] = event.error

    def run(self) -> None:
        while not self.core.idle:
            self.core.step()
        assert self.core.scheduler.pool.used == 0

    def generate(self, prompts: Seq[Seq[int]], params: SamplingParams | None = None) -> list[list[int]]:
        """Tokens of the first output of each prompt, all in one batch."""
        requests = [self.add(prompt, params) for prompt in prompts]
        self.run()
        assert not self.errors
        return [self.tokens[request.request_id, 0] for request in requests]


def stacked_logits(driver: Driver) -> list[torch.Tensor]:
    """For each sequence, in the order of arrival: logits of its tokens [output, V]."""
    keys = sorted(driver.logits, key=lambda key: (int(key[0][1:]), key[1]))
    return [torch.stack([driver.logits[key][place] for place in sorted(driver.logits[key])]) for key in keys]
