"""On a machine with an NVIDIA GPU: the engine takes it by itself, and gives what transformers gives. Skipped
elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM, SamplingParams
from tiny_models import FAMILIES, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, prompt_logprobs=1, logprobs=1)
TOPICS = ["the sea", "a lost key", "prime numbers", "winter in Oslo", "bread", "the year 1848", "tides", "robots"]


def check_against(peer: Any, llm: LLM, prompts: list[list[int]]) -> None:
    """Every token is the peer's choice, and prompt and output have the peer's log-probabilities within 1e-4.

    The peer judges the whole sequence in one pass. Where its two best tokens are closer than 1e-4, either is right:
    sums in another order decide such ties, which occur among thousands of tokens of a random model."""
    for ids, output in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        made = output.outputs[0]
        whole = ids + made.token_ids
        with torch.inference_mode():
            logprobs = peer(torch.tensor([whole], device="cuda")).logits[0].float().log_softmax(-1)[:-1].cpu()
        targets = torch.tensor(whole[1:])
        wanted = logprobs.gather(1, targets[:, None])[:, 0]
        assert output.prompt_logprobs is not None
        assert made.logprobs is not None
        entries = [*(entry for entry in output.prompt_logprobs if entry is not None), *made.logprobs]
        found = torch.tensor([entry[token].logprob for token, entry in zip(whole[1:], entries, strict=True)])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
        best = logprobs.max(dim=-1).values[len(ids) - 1 :]
        assert (best - wanted[len(ids) - 1 :]).max() < 1e-4


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tiny_models_equal_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = make_model(family, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda().eval()
    source = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 300, (length,), generator=source).tolist() for length in (1, 2, 17, 64, 100, 130)]
    with LLM(str(path), dtype="float32") as llm:
        assert llm.engine.limits.device == "cuda"
        check_against(peer, llm, prompts)


def test_searches_equal_transformers(tmp_path: Path) -> None:
    """Beams in recorded steps, alone and beside requests that draw tokens, in a pool that preempts."""
    from transformers import AutoModelForCausalLM

    path = make_model("llama-head-dim", tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda().eval()
    source = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, 300, (length,), generator=source).tolist() for length in (1, 16, 17, 60, 100)]
    search = SamplingParams(use_beam_search=True, beam_width=4, n=2, max_tokens=24, no_repeat_ngram_size=3)
    for blocks in (400, 20):
        with LLM(str(path), dtype="float32", num_blocks=blocks, block_size=16) as llm:
            batch = [prompt for prompt in prompts for _ in (0, 1)]
            outputs = llm.generate(batch, [search, SamplingParams(max_tokens=30, n=2)] * len(prompts))[::2]
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = torch.tensor([prompt], device="cuda")
            made = peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=4, num_return_sequences=2,
                max_new_tokens=24, no_repeat_ngram_size=3, eos_token_id=1, pad_token_id=0,
            )  # fmt: skip
            for theirs, ours in zip(made[:, len(prompt) :].tolist(), output.outputs, strict=True):
                assert theirs[: len(ours.token_ids)] == ours.token_ids


def test_forks_and_preempted_requests_are_what_they_are_alone(tmp_path: Path) -> None:
    """In float32, where products of other batches differ by less than a token can turn on. Outputs of one request share
    its prompt's blocks until they write; a pool of 12 blocks preempts."""
    path = make_model("llama-head-dim", tmp_path)
    prompts = [[7 * i % 290 + 5 for i in range(length)] for length in (8, 16, 17, 40)]

    def tokens(llm: LLM, prompt: list[int], **options: Any) -> list[list[int]]:
        params = SamplingParams(max_tokens=30, ignore_eos=True, **options)
        return [list(output.token_ids) for output in llm.generate(prompt, params)[0].outputs]

    with LLM(str(path), dtype="float32") as llm:
        alone = [tokens(llm, prompt, seed=5, temperature=1.2)[0] for prompt in prompts]
        for prompt, wanted in zip(prompts, alone, strict=True):
            forked = tokens(llm, prompt, seed=5, temperature=1.2, n=4)
            assert forked[0] == wanted
            greedy = tokens(llm, prompt, temperature=0.0)[0]
            assert tokens(llm, prompt, temperature=0.0, n=3) == [greedy] * 3
            assert tokens(llm, prompt, seed=5, temperature=1.2, n=4) == forked
    with LLM(str(path), dtype="float32", num_blocks=13, block_size=16, max_num_seqs=8) as llm:
        params = SamplingParams(max_tokens=30, ignore_eos=True, seed=5, temperature=1.2)
        together = llm.generate(prompts * 3, params)
        assert [list(output.outputs[0].token_ids) for output in together] == alone * 3
        assert llm.stats().preemptions > 0


def test_a_common_prefix_and_long_prompts_change_nothing(tmp_path: Path) -> None:
    """24 requests attend to a common prefix at once; in bfloat16 a prompt of 5000 tokens goes to cuDNN."""
    path = make_model("llama-head-dim", tmp_path, max_position_embeddings=8192, head_dim=64)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)

    def logprobs(output: Any) -> torch.Tensor:
        (made,) = output.outputs
        return torch.tensor([entry[token].logprob for token, entry in zip(made.token_ids, made.logprobs, strict=True)])

    source = torch.Generator().manual_seed(3)
    prefix = torch.randint(2, 300, (700,), generator=source).tolist()
    prompts = [prefix + torch.randint(2, 300, (9,), generator=source).tolist() for _ in range(24)]
    prompts.append(torch.randint(2, 300, (5000,), generator=source).tolist())
    with LLM(str(path), dtype="float32", enable_prefix_caching=False) as llm:
        assert not llm.engine.service.call(lambda core: core.runner.attention.library)
        wanted = [llm.generate(prompt, params)[0] for prompt in prompts]
    with LLM(str(path), dtype="float32") as llm:
        together = llm.generate(prompts[:-1], params)
        assert llm.stats().steps < 30, "the prefix was computed by each"
        for ours, theirs in zip(together, wanted, strict=False):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
            torch.testing.assert_close(logprobs(ours), logprobs(theirs), atol=1e-4, rtol=1e-5)
    with LLM(str(path), dtype="bfloat16") as llm:
        assert llm.engine.service.call(lambda core: core.runner.attention.library)
        forced = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        whole = wanted[-1].prompt_token_ids + list(wanted[-1].outputs[0].token_ids)
        (output,) = llm.generate(whole, forced)
        found = [entry[token].logprob for token, entry in zip(whole, output.prompt_logprobs, strict=True) if entry]
        error = (torch.tensor(found[-20:]) - logprobs(wanted[-1])).abs()
        assert error.mean() < 0.2, error


def test_no_kernel_is_compiled_for_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    path = make_model("qwen3", tmp_path, max_position_embeddings=8192)
    with LLM(str(path)) as llm:
        compiled: list[str] = []
        original = JITFunction._do_compile
        monkeypatch.setattr(
            JITFunction, "_do_compile", lambda self, *args: (compiled.append(self.__name__), original(self, *args))[1]
        )
        kinds = [
            SamplingParams(temperature=0, max_tokens=8),
            SamplingParams(temperature=0.8, max_tokens=8, n=3),
            SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, max_tokens=8, logprobs=2),
            SamplingParams(temperature=1.0, presence_penalty=0.5, max_tokens=8, prompt_logprobs=1),
        ]
        for count in (1, 3, 9, 40):
            prompts = [[(7 * n + i) % 290 + 5 for i in range(5 + 40 * n)] for n in range(count)]
            llm.generate(prompts, [kinds[n % len(kinds)] for n in range(count)])
        for params in kinds:
            llm.generate([[9] * 6000, [8] * 5000, [7] * 700], params)
            llm.generate([5, 6, 7], params)
        assert compiled == []


@pytest.fixture(scope="module")
def default_ids(default_model: Path) -> list[list[int]]:
    with LLM(str(default_model)) as llm:
        return [
            llm.tokenizer.encode(llm.chat_prompt([{"role": "user", "content": f"Tell me about {topic}."}],
            {})["prompt"]) for topic in TOPICS
        ]


def test_default_model_equals_transformers(default_model: Path, default_ids: list[list[int]]) -> None:
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    ).cuda().eval()  # fmt: skip
    with LLM(str(default_model), dtype="float32") as llm:
        check_against(peer, llm, default_ids)


def test_default_model_in_bfloat16_answers_and_does_not_wait_for_the_device(default_model: Path) -> None:
    mixed = [
        SamplingParams(temperature=0, max_tokens=24),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=1, max_tokens=24, logprobs=2),
        SamplingParams(temperature=1.0, min_p=0.1, seed=2, max_tokens=24, presence_penalty=0.5, logit_bias={5: 1.0}),
        SamplingParams(temperature=0, max_tokens=24, n=3, min_tokens=8, bad_words=["Lyon"], repetition_penalty=1.1),
    ]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with LLM(str(default_model)) as llm:
        assert llm.engine.limits.dtype == "bfloat16"
        llm.chat([question] * 4, mixed)  # kernels are compiled, buffers are there
        llm.engine.service.call(lambda core: torch.cuda.set_sync_debug_mode("error"))
        try:
            outputs = llm.chat([question] * 4, mixed)
        finally:
            llm.engine.service.call(lambda core: torch.cuda.set_sync_debug_mode("default"))
        assert all(choice.finish_reason for output in outputs for choice in output.outputs)
        assert llm.stats().blocks_used == 0


def test_bfloat16_is_close_to_float32(default_model: Path, default_ids: list[list[int]]) -> None:
    def prompt_logprobs(dtype: str) -> torch.Tensor:
        with LLM(str(default_model), dtype=dtype) as llm:
            outputs = llm.generate(default_ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        entries = [entry for output in outputs for entry in output.prompt_logprobs or () if entry is not None]
        return torch.tensor([next(iter(entry.values())).logprob for entry in entries])

    difference = (prompt_logprobs("bfloat16") - prompt_logprobs("float32")).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 1.0


def test_close_gives_the_memory_back(default_model: Path) -> None:
    LLM(str(default_model)).close()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with LLM(str(default_model)) as llm:
            llm.generate("Hello", SamplingParams(max_tokens=2))
            assert torch.cuda.memory_allocated() > before + 2**28
    assert torch.cuda.memory_allocated() <= before + 2**20
