"""Beam search gives what transformers' `generate` gives, token for token, in any company."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver
from octavo import SamplingParams
from octavo.engine.request import Request
from octavo_kernels.cpu.compiler import available
from tiny_models import FAMILIES, VOCABULARY, GraphedParts, PackedParts, Parts, make_model

WAYS: list[dict[str, Any]] = [
    {},
    {"early_stopping": True},
    {"early_stopping": "never", "length_penalty": 2.0},
    {"length_penalty": 0.0},
    {"length_penalty": -1.5, "early_stopping": "never"},
    {"no_repeat_ngram_size": 2, "length_penalty": 0.6},
    {"no_repeat_ngram_size": 3, "early_stopping": True, "min_tokens": 4},
    {"n": 4},
    {"repetition_penalty": 1.3, "n": 2},
]
"""As `SamplingParams` and, but for `n` and `min_tokens`, as transformers calls them."""


@dataclass
class Job:
    prompt: list[int]
    width: int
    max_tokens: int
    way: dict[str, Any]
    ends: list[int]

    @property
    def n(self) -> int:
        return min(self.way.get("n", 1), self.width)

    @property
    def params(self) -> SamplingParams:
        settings = self.way | {"n": self.n, "max_tokens": self.max_tokens, "stop_token_ids": self.ends[1:]}
        return SamplingParams(use_beam_search=True, beam_width=self.width, **settings)


def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def their_search(model: Any, job: Job) -> list[tuple[list[int], float]]:
    """Outputs and scores of transformers."""
    options = {name: value for name, value in job.way.items() if name not in ("n", "min_tokens")}
    if "min_tokens" in job.way:
        options["min_new_tokens"] = job.way["min_tokens"]
    if job.width == 1:
        options = {name: value for name, value in options.items() if name not in ("early_stopping", "length_penalty")}
    ids = torch.tensor([job.prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=job.width, max_new_tokens=job.max_tokens,
        num_return_sequences=job.n, eos_token_id=job.ends or None, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    outputs = []
    for row in made.sequences[:, len(job.prompt) :].tolist():
        stop = next((place + 1 for place, token in enumerate(row) if token in job.ends), len(row))
        outputs.append(row[:stop])
    scores = made.sequences_scores.tolist() if job.width > 1 else [0.0]
    return list(zip(outputs, scores, strict=True))


def make_job(model: Any, number: int, rng: random.Random) -> Job:
    """A search over a random prompt. What ends it are tokens that the model is fond of saying after this prompt:
    otherwise a random model's outputs hardly ever end."""
    prompt = [rng.randrange(2, VOCABULARY) for _ in range(rng.choice([1, 2, 15, 16, 17, 40, 70]))]
    job = Job(prompt, rng.choice([1, 2, 4, 5]), rng.choice([4, 7, 24]), WAYS[number % len(WAYS)], [])
    (said, _), *_ = their_search(model, job)
    job.ends = list(dict.fromkeys(rng.sample(said, min(len(said), rng.choice([1, 1, 3])))))
    return job


Outputs = list[tuple[list[int], float]]


def check(driver: Driver, requests: list[Request], jobs: list[Job], theirs: list[Outputs]) -> None:
    assert not driver.errors
    for request, job, expected in zip(requests, jobs, theirs, strict=True):
        keys = [(request.request_id, index) for index in range(job.n)]
        assert [driver.tokens[key] for key in keys] == [tokens for tokens, _ in expected], job
        if job.width > 1:
            scores = [driver.scores[key] for key in keys]
            assert scores == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-4)


CONDITIONS: list[dict[str, Any]] = [
    {"num_blocks": 400, "max_num_seqs": 64, "budget": 300},
    {"num_blocks": 400, "max_num_seqs": 24, "budget": 40, "depth": 1},
    {"num_blocks": 40, "max_num_seqs": 8, "budget": 20},
    {"num_blocks": 9, "max_num_seqs": 3, "budget": 7, "caching": False, "depth": 1},
]
"""Of an engine, from plenty of room to so little that beams run one after the other."""


def same_everywhere(parts: Parts, model: Any, jobs: list[Job], conditions: list[dict[str, Any]]) -> None:
    rng = random.Random(len(jobs))
    theirs = [their_search(model, job) for job in jobs]
    lengths = [len(tokens) for expected in theirs for tokens, _ in expected]
    assert len(set(lengths)) > 3, "hardly a search ends before max_tokens: a weak test"
    for settings in conditions:
        order = list(range(len(jobs)))
        rng.shuffle(order)
        driver = Driver(parts.core(**settings))
        requests = [driver.add(jobs[place].prompt, jobs[place].params, eos=jobs[place].ends[:1]) for place in order]
        driver.run()
        check(driver, requests, [jobs[place] for place in order], [theirs[place] for place in order])
        if settings["num_blocks"] < 50:
            assert driver.core.scheduler.preemptions > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_searches_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """All ways to search over prompts of many lengths, for every family, together in one engine."""
    model = reference(make_model(name, tmp_path))
    rng = random.Random(name)
    jobs = [make_job(model, number, rng) for number in range(len(WAYS))]
    rng.shuffle(jobs)
    same_everywhere(Parts(tmp_path, torch.float32), model, jobs, rng.sample(CONDITIONS, 2))


@pytest.mark.slow
def test_a_hundred_searches_in_any_company(tmp_path: Path) -> None:
    model = reference(make_model("qwen3", tmp_path))
    rng = random.Random(100)
    jobs = [make_job(model, number, rng) for number in range(100)]
    same_everywhere(Parts(tmp_path, torch.float32), model, jobs, CONDITIONS)


def test_recorded_steps_search_alike(tmp_path: Path) -> None:
    """The way of a GPU, beside requests that draw tokens."""
    model = reference(make_model("llama2-mha", tmp_path))
    rng = random.Random(6)
    jobs = [make_job(model, number, rng) for number in range(len(WAYS))]
    driver = Driver(GraphedParts(tmp_path, torch.float32).core(num_blocks=400, max_num_seqs=40, budget=64, depth=1))
    requests = []
    for job in jobs:
        requests.append(driver.add(job.prompt, job.params, eos=job.ends[:1]))
        driver.add(job.prompt, SamplingParams(max_tokens=9, n=2))
    driver.run()
    check(driver, requests, jobs, [their_search(model, job) for job in jobs])


def test_forced_tokens_count_as_made(tmp_path: Path) -> None:
    """The first token is forced: as part of the prompt, its length counts and its probability does not."""
    model = reference(make_model("qwen2", tmp_path))
    parts = Parts(tmp_path, torch.float32)
    shorter = 0
    for start in range(5, 25):
        settings: dict[str, Any] = {"length_penalty": 0.3} if start % 2 else {"early_stopping": True}
        (said, _), *_ = their_search(model, Job([start, 77], 4, 7, settings, []))
        ids = torch.tensor([[start]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=4, max_new_tokens=8,
            eos_token_id=said[2], pad_token_id=0, forced_bos_token_id=77, return_dict_in_generate=True,
            output_scores=True, **settings,
        )  # fmt: skip
        driver = Driver(parts.core())
        params = SamplingParams(use_beam_search=True, beam_width=4, max_tokens=7, **settings)
        request = Request(
            f"forced {start}", [start, 77], params, lambda event: driver._take(request, event), max_tokens=7,  # noqa: B023
            eos_token_ids=[said[2]], length_offset=1,
        )  # fmt: skip
        driver.core.add(request)
        driver.run()
        ours = driver.tokens[request.request_id, 0]
        assert [start, 77, *ours] == made.sequences[0, : 2 + len(ours)].tolist()
        assert driver.scores[request.request_id, 0] == pytest.approx(made.sequences_scores.item(), abs=1e-4)
        shorter += len(ours) < 7
    assert shorter > 0


@pytest.mark.skipif(not available(), reason="needs AVX512-VNNI and AVX512-BF16")
def test_packed_weights_search_alike_in_any_company(tmp_path: Path) -> None:
    """Their logits are the same bits in any batch, and so are the outputs and scores of searches."""
    parts = PackedParts(make_model("llama-head-dim", tmp_path), "int8")
    rng = random.Random(8)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(rng.choice([1, 30, 33, 90]))] for _ in range(12)]
    params = SamplingParams(use_beam_search=True, beam_width=4, n=2, max_tokens=20, no_repeat_ngram_size=2)
    found = []
    for settings in ({"num_blocks": 200, "budget": 300, "max_num_seqs": 48}, {"num_blocks": 8, "budget": 20}):
        driver = Driver(parts.core(**settings))
        requests = [driver.add(prompt, params, eos=[9]) for prompt in prompts]
        driver.run()
        keys = [(request.request_id, index) for request in requests for index in (0, 1)]
        found.append([(driver.tokens[key], driver.scores[key]) for key in keys])
    assert found[0] == found[1]
