"""A request's logits are the same bits alone, in a batch, in chunks, from the cache, after a preemption.

Hence its tokens depend on nothing but the request, also where two logits nearly tie, and also when they are sampled.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver, stacked_logits
from octavo import SamplingParams
from octavo_kernels.cpu.compiler import available
from tiny_models import Parts, parts_of

KINDS = [
    "float32", "bfloat16",
    pytest.param("packed", marks=pytest.mark.skipif(not available(), reason="needs AVX512-VNNI and AVX512-BF16")),
]  # fmt: skip
CONDITIONS: dict[str, dict[str, Any]] = {
    "in one batch": {"budget": 512},
    "in chunks of 16": {"max_num_seqs": 16, "budget": 16},
    "in chunks of 37": {"max_num_seqs": 16, "budget": 37},
    "in blocks of 32": {"block_size": 32, "num_blocks": 200},
    "in blocks of 64": {"block_size": 64, "num_blocks": 100},
    "with preemptions": {"num_blocks": 24},
    "overlapped": {"depth": 1, "num_blocks": 24},
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def logits_of(
    parts: Parts, prompts: list[list[int]], outputs: int, **settings: Any
) -> tuple[list[torch.Tensor], Driver]:
    driver = Driver(parts.core(**({"num_blocks": 400} | settings)), record=True)
    driver.generate(prompts, SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True))
    return stacked_logits(driver), driver


def alone(parts: Parts, prompts: list[list[int]], outputs: int) -> list[torch.Tensor]:
    return [logits_of(parts, [prompt], outputs, budget=512, caching=False)[0][0] for prompt in prompts]


def some_prompts(lengths: list[int], vocabulary: int) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(2, vocabulary) for _ in range(length)] for length in lengths]


def same_bits(ours: list[torch.Tensor], expected: list[torch.Tensor], condition: str) -> None:
    for number, (got, wanted) in enumerate(zip(ours, expected, strict=True)):
        unequal = (got != wanted).any(dim=-1).nonzero().flatten().tolist()
        assert not unequal, f"{condition}: request {number} differs at its tokens {unequal}"


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_model(tiny_model: Path, kind: str) -> None:
    parts = parts_of(tiny_model, kind)
    prompts = some_prompts([1, 2, 3, 15, 16, 17, 31, 33, 47, 64, 65, 90, 100, 130, 200, 230], 300)
    expected = alone(parts, prompts, 40)
    for condition, settings in CONDITIONS.items():
        logits, driver = logits_of(parts, prompts, 40, **settings)
        same_bits(logits, expected, condition)
        if settings.get("num_blocks") == 24:
            assert driver.core.scheduler.preemptions > 0, "the pool was not short: nothing was shown"


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_model_from_the_prefix_cache(tiny_model: Path, kind: str) -> None:
    parts = parts_of(tiny_model, kind)
    (prefix,) = some_prompts([100], 300)
    prompts = [prefix + tail for tail in some_prompts([1, 5, 20, 33], 300)] + [prefix]
    expected = alone(parts, prompts, 20)
    driver = Driver(parts.core(num_blocks=400), record=True)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    driver.generate(prompts[:1], params)
    for prompt in prompts[1:]:
        request = driver.add(prompt, params)
        driver.run()
        assert request.metrics.cached_tokens == 96
    same_bits(stacked_logits(driver), expected, "from the cache")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_one_prompt_see_the_same_bits(tiny_model: Path, kind: str) -> None:
    """n = 4 greedy outputs, forked: all equal to the single one."""
    parts = parts_of(tiny_model, kind)
    for prompt in some_prompts([1, 16, 17, 40, 75], 300):
        (expected,) = alone(parts, [prompt], 20)
        driver = Driver(parts.core(), record=True)
        driver.add(prompt, SamplingParams(temperature=0.0, max_tokens=20, n=4, ignore_eos=True))
        driver.run()
        same_bits(stacked_logits(driver), [expected] * 4, "forked")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_default_model(default_model: Path, kind: str, threads: int) -> None:
    parts = parts_of(default_model, kind)
    # two threads on a busy machine wait for each other at every product: fewer tokens there
    prompts = some_prompts([1, 16, 40, 70, 130] if threads == 1 else [1, 33, 70], 49000)
    outputs = 4 if threads == 1 else 2
    expected = alone(parts, prompts, outputs)
    for condition in ("in one batch", "in chunks of 37", "with preemptions")[: 3 if threads == 1 else 2]:
        logits, _ = logits_of(parts, prompts, outputs, **CONDITIONS[condition])
        same_bits(logits, expected, condition)
