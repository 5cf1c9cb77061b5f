"""Random traces on a real model: requests that share prefixes arrive, fork, are aborted and preempted in tiny pools.

Every request's tokens, texts, ends and log-probabilities must equal those of its solo run, bit for bit. Used by
`test_traces.py` (a few hundred traces) and by `benchmarks/traces.py` (any number).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.decode.assemble import Assembler
from octavo.engine.core import EngineCore
from octavo.execute.context import ForwardContext
from tiny_models import Parts

CASES = 100


@dataclass(frozen=True, eq=False)
class Case:
    prompt: tuple[int, ...]
    params: SamplingParams
    salt: str = ""

    @property
    def tokens(self) -> int:
        return len(self.prompt) + (self.params.max_tokens or 0)


class Flaky:
    """The real model, which now and then fails in a step of several sequences: each must then succeed alone."""

    def __init__(self, model: Any, rng: random.Random) -> None:
        self.model, self.rng, self.failures = model, rng, 0
        self.logits = model.logits

    def forward(self, context: ForwardContext) -> torch.Tensor:
        hidden = self.model.forward(context)  # the cache is written when it fails
        if len(context.inputs.counts) > 1 and self.rng.random() < 0.04:
            self.failures += 1
            raise RuntimeError("out of luck")
        return hidden


@dataclass
class Totals:
    traces: int = 0
    requests: int = 0
    aborted: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    failures: int = 0
    steps: int = 0
    tokens: int = 0
    seen: set[str] = field(default_factory=set)


def summary(output: Any) -> list[tuple[Any, ...]]:
    """All that a caller sees of a finished request."""
    return [
        (tuple(o.token_ids), o.text, o.finish_reason, o.stop_reason, o.cumulative_logprob, str(o.logprobs))
        for o in output.outputs
    ]


class Bench:
    """A model, a catalogue of requests, and what each gives alone."""

    def __init__(self, path: Path, dtype: torch.dtype, seed: int = 0) -> None:
        kind = str(dtype).removeprefix("torch.")
        self.llm = LLM(str(path), dtype=kind, num_blocks=65, block_size=16, deterministic=True)
        self.parts = Parts(path, dtype, deterministic=True)
        self.cases = self._catalogue(random.Random(seed))
        self._alone: dict[Case, Any] = {}

    def close(self) -> None:
        self.llm.close()

    def _catalogue(self, rng: random.Random) -> list[Case]:
        roots = [tuple(rng.randrange(2, 300) for _ in range(length)) for length in (20, 33, 64, 90)]
        cases = []
        for _ in range(CASES):
            root = rng.choice(roots)
            prompt = root[: rng.choice([len(root), rng.randint(1, len(root)), 16, 32])]
            prompt += tuple(rng.randrange(2, 300) for _ in range(rng.choice([0, 0, 1, 5, 20])))
            n = rng.choice([1, 1, 1, 2, 3])
            params: dict[str, Any] = {
                "max_tokens": rng.choice([1, 4, 16, 24, 40]), "n": n, "seed": rng.randrange(2**40),
                "temperature": rng.choice([0.0, 0.3, 1.0, 1.5]), "ignore_eos": rng.random() < 0.5,
                "logprobs": rng.choice([None, None, 0, 3]),
            }  # fmt: skip
            params |= rng.choice([
                {}, {}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.3},
                {"frequency_penalty": 0.7, "presence_penalty": 0.2}, {"min_tokens": 1},
                {"logit_bias": {5: 4.0, 1: 2.0}},
                {"bad_words": ["the", "e"]}, {"best_of": n + 1, "logprobs": None},
                {"structured_outputs": StructuredOutputsParams(regex="[a-e]{3,20}(0|1|2)+")},
                {"structured_outputs": StructuredOutputsParams(json_object=True)},
            ])  # fmt: skip
            cases.append(Case(prompt, SamplingParams(**params), rng.choice(["", "", "", "tenant"])))
        for number in range(0, CASES, 3):  # a third gets a stop string that really comes
            case = cases[number]
            text = self.llm.generate(list(case.prompt), case.params)[0].outputs[0].text
            if len(text) > 3:
                place = rng.randrange(len(text) - 2)
                include = rng.random() < 0.5
                params = replace(case.params, stop=text[place : place + 2], include_stop_str_in_output=include)
                cases[number] = replace(case, params=params)
        return cases

    def alone(self, case: Case) -> Any:
        """The request run by itself, with nothing cached, through the public way."""
        if case not in self._alone:
            self.llm.engine.service.call(lambda core: core.scheduler.pool.clear_cache())
            (output,) = self.llm.generate({"prompt_token_ids": list(case.prompt), "cache_salt": case.salt}, case.params)
            self._alone[case] = output
        return self._alone[case]

    def trace(self, seed: int, totals: Totals) -> None:
        """One trace; raises AssertionError naming the seed when anything is wrong."""
        rng = random.Random(seed)
        rows = rng.choice([1, 3, 5, 8])
        settings = {
            "num_blocks": rng.choice([4, 5, 6, 8, 12, 33]), "block_size": rng.choice([16, 32]), "max_num_seqs": rows,
            "budget": rng.choice([rows, rows + 7, 40, 64, 300]), "depth": rng.choice([0, 0, 1]),
            "caching": rng.random() < 0.9,
        }  # fmt: skip
        flaky = Flaky(self.parts.model, rng) if rng.random() < 0.2 else None
        core = self.parts.core(**settings, model=flaky)
        core.runner.waits_for_masks = settings["depth"] > 0  # as on a GPU
        room = (settings["num_blocks"] - 1) * settings["block_size"]
        fitting = [case for case in self.cases if case.tokens <= room]
        run = _Run(self, core, [rng.choice(fitting) for _ in range(rng.randint(3, 10))], rng)
        run.all(f"trace {seed} {settings}")
        totals.traces += 1
        totals.requests += len(run.cases)
        totals.aborted += len(run.aborted)
        totals.preemptions += core.scheduler.preemptions
        totals.cached_tokens += sum(a.request.metrics.cached_tokens for a in run.assemblers)
        totals.failures += flaky.failures if flaky else 0
        totals.steps += core.steps
        totals.tokens += sum(a.request.metrics.output_tokens for a in run.assemblers)
        totals.seen |= {choice[2] for number in run.whole for choice in summary(run.assemblers[number].output())}


class _Run:
    """A trace under way: arrivals and aborts at random steps, aborts of stop strings one step late as in the
    service."""

    def __init__(self, bench: Bench, core: EngineCore, cases: list[Case], rng: random.Random) -> None:
        self.bench, self.core, self.cases, self.rng = bench, core, cases, rng
        self.assemblers: list[Assembler] = []
        self.aborted: set[int] = set()
        self._aborts: list[tuple[Any, int | None]] = []

    @property
    def whole(self) -> list[int]:
        return [number for number in range(len(self.cases)) if number not in self.aborted]

    def all(self, what: str) -> None:
        expected = [self.bench.alone(case) for case in self.cases]
        scheduler, pool = self.core.scheduler, self.core.scheduler.pool
        steps = 0
        while len(self.assemblers) < len(self.cases) or not self.core.idle:
            while len(self.assemblers) < len(self.cases) and (self.core.idle or self.rng.random() < 0.35):
                self._arrive(self.cases[len(self.assemblers)])
            if self.rng.random() < 0.01:
                number = self.rng.randrange(len(self.assemblers))
                self.aborted.add(number)
                self._aborts.append((self.assemblers[number].request, None))
            for request, index in self._aborts:
                scheduler.abort(request, index)
            self._aborts.clear()
            self.core.step()
            steps += 1
            assert len(pool._free) + pool.cached + pool.used == pool.capacity, what
            assert steps < 20_000, f"{what}: no end"
        assert pool.used == 0, what
        for number, (assembler, wanted) in enumerate(zip(self.assemblers, expected, strict=True)):
            place = f"{what}, request {number}: {self.cases[number]}"
            assert assembler.done, place
            assert assembler.error is None, f"{place}: {assembler.error!r}"
            if number in self.aborted:
                self._is_beginning(assembler, number, place)
            else:
                assert summary(assembler.output()) == summary(wanted), place

    def _arrive(self, case: Case) -> None:
        llm = self.bench.llm
        prompt = {"prompt_token_ids": list(case.prompt), "cache_salt": case.salt}
        number = len(self.assemblers)
        assembler = llm.make_request(
            prompt, case.params, lambda event: self._push(number, event), priority=self.rng.choice([0, 0, 0, -1, 2])
        )
        assembler._abort = lambda request, index: self._aborts.append((request, index))
        self.assemblers.append(assembler)
        self.core.scheduler.add(assembler.request)

    def _push(self, number: int, event: Any) -> None:
        self.assemblers[number].push(event)

    def _is_beginning(self, assembler: Assembler, number: int, place: str) -> None:
        """What an aborted request had made is the beginning of what it would have made."""
        params = self.cases[number].params
        if params.width > params.n:
            return  # the best of unfinished ones need not be the best of finished ones
        wanted = self.bench.alone(self.cases[number]).outputs
        for ours, whole in zip(assembler.output().outputs, wanted, strict=True):
            assert whole.token_ids[: len(ours.token_ids)] == ours.token_ids, place
