"""A cache in which everything that nobody owns is NaN: free blocks, and so the slots behind the end of each sequence in
its last block. On a GPU none of it is ever read. Used by `test_graphs.py` on the CPU, with the same attention, and by
`test_gpu_accuracy.py`."""

from __future__ import annotations

import random
from typing import Any

from core_driver import Driver
from octavo import SamplingParams
from octavo.engine.core import EngineCore


def poison(core: EngineCore) -> int:
    """Write NaN over all free blocks of an idle core. Block 0 stays zero, and what the prefix cache holds stays too.
    Returns how many there were."""
    free: list[int] = core.scheduler.pool._free
    kv = core.runner.kv  # type: ignore[attr-defined]
    for cache in kv.tensors:
        cache[free] = float("nan")
    return len(free)


def mixed_batches(core: EngineCore, *, poisoned: bool, longest: int = 150) -> list[Any]:
    """Tokens and log-probabilities of two batches: prompts of all lengths, in chunks beside decoding ones, a common
    prefix of which the second batch finds a part, and outputs that fork."""
    rng, found = random.Random(4), []
    common = [rng.randrange(2, 299) for _ in range(longest // 2)]
    for _ in range(2):
        if poisoned:
            assert poison(core) > 50
        driver, made = Driver(core), []
        lengths = [1, 15, 16, 17, 40, longest - 1]
        prompts = [[rng.randrange(2, 299) for _ in range(length)] for length in lengths]
        prompts += [common + [rng.randrange(2, 299) for _ in range(1 + n)] for n in range(10)]
        for number, prompt in enumerate(prompts):
            options: dict[str, Any] = {"temperature": 0.8 * (number % 3), "max_tokens": 20, "ignore_eos": True}
            options |= {"logprobs": 2, "n": 2} if number % 4 == 0 else {}
            options |= {"prompt_logprobs": 1} if number % 5 == 3 else {}
            made.append(driver.add(prompt, SamplingParams(**options), seed=number))
            if number % 3 == 2:
                core.step()
        driver.run()
        assert not driver.errors
        for request in made:
            for index in range(len(request.sequences)):
                key = (request.request_id, index)
                found.append((driver.tokens[key], driver.logprobs.get(key), driver.prompt_logprobs.get(key)))
    assert any(logprobs for _, logprobs, _ in found)
    return found
