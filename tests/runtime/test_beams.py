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
from tiny_models import VOCABULARY, Parts, make_model

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
            assert scores == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.parametrize("name", ["llama2-mha", "qwen2-window", "qwen3", "mistral-window"])
def test_searches_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Prompts of many lengths with all ways to search, in one engine which is short of rows, budget and blocks."""
    model = reference(make_model(name, tmp_path))
    parts = Parts(tmp_path, torch.float32)
    rng = random.Random(name)
    jobs = [make_job(model, number, rng) for number in range(27)]
    theirs = [their_search(model, job) for job in jobs]
    lengths = [len(tokens) for expected in theirs for tokens, _ in expected]
    assert len(set(lengths)) > 5, "hardly a search ends before max_tokens: a weak test"
    for settings in (
        {"num_blocks": 400, "max_num_seqs": 64, "budget": 300},
        {"num_blocks": 40, "max_num_seqs": 8, "budget": 20},
        {"num_blocks": 9, "max_num_seqs": 3, "budget": 7, "caching": False},
    ):
        order = list(range(len(jobs)))
        rng.shuffle(order)
        jobs, theirs = [jobs[place] for place in order], [theirs[place] for place in order]
        driver = Driver(parts.core(**settings))
        requests = [driver.add(job.prompt, job.params, eos=job.ends[:1]) for job in jobs]
        driver.run()
        check(driver, requests, jobs, theirs)
