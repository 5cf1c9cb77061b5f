"""`deterministic=True` on a GPU: tokens and their log-probabilities are the same to the bit, whatever runs beside a
request and however it was cut into steps. Skipped elsewhere; for the CPU see `test_batch_invariance.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM, SamplingParams
from tiny_models import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "max_position_embeddings": 16384}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 0.9, "presence_penalty": 0.5, "repetition_penalty": 1.1},
]


def params(number: int) -> SamplingParams:
    kind = KINDS[number % len(KINDS)]
    return SamplingParams(**kind, max_tokens=24, ignore_eos=True, logprobs=0, seed=100 + number)


def bits(output: Any) -> list[tuple[int, float]]:
    (made,) = output.outputs
    return [(token, entry[token].logprob) for token, entry in zip(made.token_ids, made.logprobs, strict=True)]


@pytest.mark.parametrize("family", ["llama-head-dim", "qwen2", "qwen3", "mistral-window"])
def test_a_request_is_what_it_is_alone(family: str, tmp_path: Path) -> None:
    path = make_model(family, tmp_path, **SHAPE)
    source = torch.Generator().manual_seed(7)
    lengths = [1, 15, 16, 17, 64, 130, 257, 300, 700, 1500] + [20 + 7 * n for n in range(30)]
    common = torch.randint(2, 300, (150,), generator=source).tolist()
    prompts = [torch.randint(2, 300, (length,), generator=source).tolist() for length in lengths]
    prompts += [common + prompt[:20] for prompt in prompts[10:20]]
    numbers = list(range(len(prompts)))
    settings: dict[str, Any] = {"dtype": "bfloat16", "deterministic": True}

    def run(llm: LLM, order: list[int]) -> dict[int, list[tuple[int, float]]]:
        outputs = llm.generate([prompts[n] for n in order], [params(n) for n in order])
        return {n: bits(output) for n, output in zip(order, outputs, strict=True)}

    with LLM(str(path), **settings, enable_prefix_caching=False) as llm:
        alone = {n: run(llm, [n])[n] for n in numbers}
        assert run(llm, numbers) == alone
        assert run(llm, numbers[::-1]) == alone
        assert run(llm, numbers[:3]) == {n: alone[n] for n in numbers[:3]}
    with LLM(str(path), **settings) as llm:  # beginnings are found in the cache
        for order in (numbers, numbers[::-1], numbers[5:25]):
            assert run(llm, order) == {n: alone[n] for n in order}
        assert all(output.num_cached_tokens > 0 for output in llm.generate(prompts[-3:], params(0)))
    with LLM(str(path), **settings, max_num_batched_tokens=64, max_num_seqs=32) as llm:  # in chunks
        assert run(llm, numbers) == alone
    with LLM(str(path), **settings, num_blocks=140, max_num_seqs=32) as llm:
        assert run(llm, numbers) == alone
        assert llm.stats().preemptions > 0


def test_prompts_longer_than_any_graph(tmp_path: Path) -> None:
    path = make_model("qwen3", tmp_path, **SHAPE)
    prompts = [[(7 * n + i * i) % 290 + 5 for i in range(length)] for n, length in enumerate((9000, 5000, 40))]
    with LLM(str(path), dtype="bfloat16", deterministic=True, enable_prefix_caching=False) as llm:
        alone = [bits(llm.generate(prompt, params(n))[0]) for n, prompt in enumerate(prompts)]
        together = llm.generate(prompts, [params(n) for n in range(3)])
        assert [bits(output) for output in together] == alone
