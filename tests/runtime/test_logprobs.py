"""`logprobs` and `prompt_logprobs` equal those of transformers: values, ranks, and which tokens are reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM, SamplingParams
from octavo.outputs import TokenLogprobs

PROMPTS = [[5], [9, 8, 7, 6], [i * 7 % 290 + 2 for i in range(75)], [i * 11 % 290 + 2 for i in range(130)]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[512, 48], ids=["whole prompts", "in chunks"])
def llm(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(str(tiny_model), dtype="float32", max_num_batched_tokens=request.param, max_num_seqs=16) as llm:
        yield llm


def expected(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)


def check(found: TokenLogprobs, row: torch.Tensor, token: int, count: int) -> None:
    """One position: the `count` best tokens, best first, and the chosen one, with value and rank. Among a hundred
    tokens some are equal to the last bit or so: their order is free, so a rank is right if the token there has this
    value."""
    best = row.sort(descending=True).values.tolist()
    assert list(found)[count:] in ([], [token])
    assert token in found
    assert [entry.rank for entry in list(found.values())[:count]] == list(range(1, count + 1))
    for other, entry in found.items():
        assert abs(entry.logprob - row[other].item()) < TOLERANCE
        assert entry.rank is not None
        assert abs(best[entry.rank - 1] - row[other].item()) < TOLERANCE


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_logprobs(llm: LLM, reference: Any, count: int) -> None:
    """Greedy and sampled, with penalties and filters: they are those of the raw logits."""
    common = {"max_tokens": 12, "ignore_eos": True, "logprobs": count}
    params = [
        SamplingParams(temperature=0.0, **common), SamplingParams(temperature=1.3, seed=1, **common),
        SamplingParams(temperature=0.7, top_k=3, seed=2, repetition_penalty=1.5, **common),
        SamplingParams(temperature=0.0, logit_bias={9: 3.0}, **common),
    ]  # fmt: skip
    for prompt, param, output in zip(PROMPTS, params, llm.generate(PROMPTS, params), strict=True):
        (choice,) = output.outputs
        assert choice.logprobs is not None
        rows = expected(reference, prompt + choice.token_ids)
        for place, (token, found) in enumerate(zip(choice.token_ids, choice.logprobs, strict=True)):
            check(found, rows[len(prompt) - 1 + place], token, count)
        total = sum(found[token].logprob for token, found in zip(choice.token_ids, choice.logprobs, strict=True))
        assert choice.cumulative_logprob == pytest.approx(total)
        assert param.logprobs == count


@pytest.mark.parametrize("count", [0, 1, 20])
def test_prompt_logprobs(llm: LLM, reference: Any, count: int) -> None:
    """Also when the prompt is in the cache already, and in a batch with requests that do not ask."""
    asking = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=count)
    plain = SamplingParams(temperature=0.0, max_tokens=3)
    llm.generate(PROMPTS, plain)
    for _ in range(2):
        outputs = llm.generate(PROMPTS + PROMPTS, [asking] * 4 + [plain] * 4)
        for prompt, output in zip(PROMPTS, outputs, strict=False):
            rows = expected(reference, prompt)
            assert output.prompt_logprobs is not None
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == len(prompt)
            for place, found in enumerate(output.prompt_logprobs[1:]):
                assert found is not None
                check(found, rows[place], prompt[place + 1], count)
        assert all(output.prompt_logprobs is None for output in outputs[4:])


def test_prompt_logprobs_come_once_in_spite_of_preemptions_and_forks(tiny_model: Path, reference: Any) -> None:
    prompts = [[(i * j) % 290 + 2 for i in range(60)] for j in (3, 5, 7, 11)]
    params = SamplingParams(temperature=0.8, max_tokens=40, ignore_eos=True, prompt_logprobs=2, n=2, seed=4)
    with LLM(str(tiny_model), dtype="float32", num_blocks=15, block_size=16, max_num_batched_tokens=70) as llm:
        outputs = llm.generate(prompts, params)
        assert llm.stats().preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        rows = expected(reference, prompt)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == 60
        for place, found in enumerate(output.prompt_logprobs[1:]):
            assert found is not None
            check(found, rows[place], prompt[place + 1], 2)


def test_decoded_tokens_are_the_tokenizers(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=3)
    choice = llm.generate("The quick brown", params)[0].outputs[0]
    assert choice.logprobs is not None
    for found in choice.logprobs:
        for token, entry in found.items():
            assert entry.decoded_token == llm.tokenizer.token_text(token)


def test_best_of_returns_the_most_likely(llm: LLM) -> None:
    """`best_of` makes the outputs that `n` of the same width makes, and returns the best of them."""
    everything = SamplingParams(n=6, seed=3, temperature=1.5, max_tokens=10, logprobs=0, ignore_eos=True)
    best = SamplingParams(n=2, best_of=6, seed=3, temperature=1.5, max_tokens=10, ignore_eos=True)
    all_six = llm.generate(PROMPTS[1], everything)[0].outputs
    two = llm.generate(PROMPTS[1], best)[0].outputs
    ranked = sorted(all_six, key=lambda output: -(output.cumulative_logprob or 0.0))
    assert [output.token_ids for output in two] == [output.token_ids for output in ranked[:2]]
    assert [output.index for output in two] == [0, 1]
    assert [output.cumulative_logprob for output in two] == [output.cumulative_logprob for output in ranked[:2]]
    assert all(output.logprobs is None for output in two)
