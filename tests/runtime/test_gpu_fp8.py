"""`kv_cache_dtype="fp8"` on a GPU. Skipped where there is none, or one below compute capability 8.9."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM, SamplingParams
from octavo.outputs import RequestOutput
from tiny_models import make_model

ABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ABLE, reason="needs an NVIDIA GPU that knows FP8")]

LONG = {"max_position_embeddings": 8192, "head_dim": 64}


def prompts_of(lengths: list[int]) -> list[list[int]]:
    source = torch.Generator().manual_seed(5)
    return [torch.randint(2, 300, (length,), generator=source).tolist() for length in lengths]


def prompt_logprobs(output: RequestOutput) -> torch.Tensor:
    entries = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
    return torch.tensor([entry[token].logprob for token, entry in entries if entry is not None])


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("family", ["llama-head-dim", "qwen2", "qwen3", "mistral-window"])
def test_log_probabilities_are_near_those_of_a_wider_cache(family: str, tmp_path: Path) -> None:
    """A stored number is off by 2^-4 of itself at most, by a quarter of that in the mean. These models spread their
    attention over all keys, so the errors of values average out; half of the bound for bfloat16 itself would be met."""
    path = make_model(family, tmp_path, **(LONG if family == "llama-head-dim" else {}))
    lengths = [5, 64, 130, 300] + ([5000] if family == "llama-head-dim" else [])  # the last goes to cuDNN
    judge = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found: dict[str, list[torch.Tensor]] = {}
    for kind in ("auto", "fp8"):
        with LLM(str(path), dtype="bfloat16", kv_cache_dtype=kind) as llm:
            found[kind] = [prompt_logprobs(output) for output in llm.generate(prompts_of(lengths), judge)]
    for wide, narrow in zip(found["auto"], found["fp8"], strict=True):
        error = (wide - narrow).abs()
        print(family, len(wide), f"mean {float(error.mean()):.4f} largest {float(error.max()):.4f}")
        assert 0 < error.mean() < 0.1
        assert error.max() < 1.0


def test_the_same_memory_holds_twice_the_tokens(tmp_path: Path) -> None:
    path, blocks = make_model("llama-head-dim", tmp_path), []
    for kind in ("auto", "fp8_e4m3"):
        with LLM(str(path), dtype="bfloat16", kv_cache_dtype=kind, kv_cache_memory=2**24) as llm:
            blocks.append(llm.stats().blocks_total)
    assert blocks[1] in (2 * blocks[0], 2 * blocks[0] + 1, 2 * blocks[0] + 2)  # one is kept as padding


def test_tokens_are_the_same_after_forks_hits_and_preemptions(tmp_path: Path) -> None:
    """In float32, where products of other batches differ by less than a token can turn on."""
    path = make_model("qwen3", tmp_path)
    prompts = prompts_of([3, 16, 17, 40, 61])
    settings: dict[str, Any] = {"dtype": "float32", "kv_cache_dtype": "fp8"}
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with LLM(str(path), **settings) as llm:
        alone = [tokens(llm.generate(prompt, params))[0] for prompt in prompts]
        assert tokens(llm.generate(prompts, params)) == alone
        again = llm.generate(prompts, params)
        assert tokens(again) == alone
        assert again[-1].num_cached_tokens >= 48
        forked = llm.generate(prompts[3], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, n=3))[0]
        assert [list(output.token_ids) for output in forked.outputs] == [alone[3]] * 3
    with LLM(str(path), **settings, num_blocks=13, max_num_seqs=8) as llm:
        assert tokens(llm.generate(prompts * 2, params)) == alone * 2
        assert llm.stats().preemptions > 0


def test_deterministic_with_it(tmp_path: Path) -> None:
    path = make_model("llama-head-dim", tmp_path, hidden_size=512, head_dim=128)
    prompts = prompts_of([5, 90, 260, 400, 33, 170, 300, 20, 64])
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)
    with LLM(str(path), dtype="bfloat16", kv_cache_dtype="fp8", deterministic=True) as llm:
        def bits(outputs: list[RequestOutput]) -> list[list[float]]:
            return [[entry[token].logprob for token, entry in zip(made.token_ids, made.logprobs or [], strict=True)]
                    for made in (output.outputs[0] for output in outputs)]  # fmt: skip

        alone = [bits(llm.generate(prompt, params))[0] for prompt in prompts]
        assert bits(llm.generate(prompts, params)) == alone
