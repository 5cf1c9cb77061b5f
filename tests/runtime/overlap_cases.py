"""Requests with everything that can be asked for, run on a core step by step in a fixed order: the same work with and
without steps that overlap. Used by `test_overlap.py` on the CPU and by `test_gpu_accuracy.py`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.decode.assemble import Assembler
from octavo.engine.core import EngineCore
from octavo.outputs import RequestOutput

FEATURES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.2},
    {"temperature": 0.8, "logprobs": 3},
    {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.7, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 1},
    {"temperature": 1.1, "n": 3},
    {"temperature": 1.0, "n": 2, "best_of": 4},
    {"temperature": 0.0, "n": 2, "presence_penalty": 0.2},
    {"temperature": 0.9, "bad_words": ["the", "e", "on and"]},
    {"temperature": 0.8, "logit_bias": {7: 2.0, 1: 6.0}, "min_tokens": 6},
    {"temperature": 1.0, "logit_bias": {1: 8.0}},
    {"temperature": 1.0, "allowed_token_ids": list(range(40, 90))},
    {"temperature": 1.0, "stop_token_ids": list(range(2, 120, 5)), "min_tokens": 2},
    {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(regex="[a-c]{4,9}x[0-9]{5,}"), "logprobs": 2},
    {"temperature": 1.2, "structured_outputs": StructuredOutputsParams(json_object=True), "n": 2},
]
STOPPED = (1, 2, 6, 8, 11)
"""Those which run again with a stop string that comes."""


@dataclass(frozen=True)
class Work:
    prompt: list[int]
    params: SamplingParams
    priority: int
    abort_at: int | None = None
    """A step before which the request is aborted."""


@dataclass
class Done:
    outputs: list[RequestOutput] = field(default_factory=list)
    preemptions: int = 0
    cached_tokens: int = 0
    under_way: int = 0
    """The most steps that were under way after one was planned."""


def everything(llm: LLM, core: EngineCore) -> list[Work]:
    """The requests. Stop strings are taken from texts that the core makes without them."""
    rng = random.Random(8)
    common = [rng.randrange(2, 299) for _ in range(40)]
    plain = []
    for number, feature in enumerate(FEATURES):
        own = [rng.randrange(2, 299) for _ in range(rng.choice([1, 3, 16, 17, 60, 110]))]
        params = SamplingParams(max_tokens=rng.choice([12, 20, 30]), **feature)
        plain.append(Work(common + own if number % 2 == 0 else own, params, rng.choice([0, 0, 0, -1, 2])))
    alone = run(llm, core, plain, depth=0).outputs
    stopped = []
    for number in STOPPED:
        texts = [output.text for output in alone[number].outputs if len(output.text) > 6]
        middle = len(texts[0]) // 2
        for include in (False, True):
            stop = [texts[0][middle : middle + 2], "no such words"]
            params = replace(plain[number].params, stop=stop, include_stop_str_in_output=include)
            stopped.append(replace(plain[number], params=params))
    aborted = [replace(plain[number], abort_at=step) for number, step in ((0, 3), (8, 9), (5, 14), (9, 20))]
    work = [*plain, *stopped, *aborted]
    rng.shuffle(work)
    return work


def run(llm: LLM, core: EngineCore, work: Sequence[Work], *, depth: int) -> Done:
    """On the thread that owns `core`, which is idle. Two requests come in a step; what a stop string aborts is aborted
    before the next step, as in the service."""
    assert core.idle
    core.depth = depth
    core.runner.waits_for_masks = depth > 0  # type: ignore[attr-defined]
    scheduler = core.scheduler
    scheduler.pool.clear_cache()
    before, done = scheduler.preemptions, Done()
    assemblers: list[Assembler] = []
    aborts: list[tuple[Any, int | None]] = []

    def abort(request: Any, index: int | None) -> None:
        aborts.append((request, index))

    step = 0
    while len(assemblers) < len(work) or not core.idle:
        for item in work[len(assemblers) : len(assemblers) + 2]:
            number = len(assemblers)

            def push(event: Any, number: int = number) -> None:
                assemblers[number].push(event)

            made = llm.make_request(item.prompt, item.params, push, priority=item.priority)
            made._abort = abort
            made.request.seed = item.params.seed or number  # those without a seed draw the next one of the engine
            assemblers.append(made)
            scheduler.add(made.request)
        aborts += [(made.request, None) for made, item in zip(assemblers, work, strict=False) if item.abort_at == step]
        for request, index in aborts:
            scheduler.abort(request, index)
        aborts.clear()
        core.step()
        done.under_way = max(done.under_way, len(core._under_way))
        step += 1
        assert step < 5000, "no end"
    assert scheduler.pool.used == 0
    assert [made.error for made in assemblers if made.error] == []
    done.outputs = [made.output() for made in assemblers]
    done.preemptions = scheduler.preemptions - before
    done.cached_tokens = sum(made.request.metrics.cached_tokens for made in assemblers)
    return done


def _logprobs(output: RequestOutput) -> torch.Tensor:
    entries = [entry for entry in output.prompt_logprobs or [] if entry is not None]
    for choice in output.outputs:
        entries += choice.logprobs or []
    return torch.tensor([value.logprob for entry in entries for value in entry.values()])


def check_same(work: Sequence[Work], plain: Done, overlapped: Done) -> None:
    """Tokens, texts and ends are equal, log-probabilities as close as sums in other batches are. Of what was aborted,
    one is the beginning of the other."""
    ends = set()
    for item, ours, wanted in zip(work, overlapped.outputs, plain.outputs, strict=True):
        for mine, other in zip(ours.outputs, wanted.outputs, strict=True):
            if item.abort_at is not None and "abort" in (mine.finish_reason, other.finish_reason):
                if item.params.best_of is None:
                    length = min(len(mine.token_ids), len(other.token_ids))
                    assert mine.token_ids[:length] == other.token_ids[:length], item
                ends.add("abort")
                continue
            assert mine.token_ids == other.token_ids, item
            assert (mine.text, mine.finish_reason, mine.stop_reason) == (
                other.text, other.finish_reason, other.stop_reason
            ), item  # fmt: skip
            ends.add(type(mine.stop_reason).__name__ if mine.stop_reason is not None else mine.finish_reason)
        if item.abort_at is None:
            torch.testing.assert_close(_logprobs(ours), _logprobs(wanted), atol=1e-4, rtol=1e-5)
    assert ends == {"abort", "length", "stop", "str", "int"}, "an end that was meant to come did not"
    assert (plain.under_way, overlapped.under_way) == (0, 1), "nothing overlapped"
