"""Log-probabilities of an engine by the ways that keys and values can take, through the public calls, and what a peer
gives for the same tokens in one pass. Used by `test_gpu_accuracy.py`; runs on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from octavo import LLM, SamplingParams
from octavo.outputs import RequestOutput, TokenLogprobs

DECODED = 48


@dataclass(frozen=True)
class Judged:
    """`found[i]` is what the engine gives for `tokens[first + i]` after all tokens before it."""

    tokens: list[int]
    first: int
    found: torch.Tensor


def prompts_of_many_lengths(longest: int = 400, seed: int = 1) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    lengths = [2, 15, 16, 17, 33, 64, 100, 130, 150, 200, 256, 300, longest]
    return [torch.randint(2, 300, (length,), generator=source).tolist() for length in lengths]


def _of(tokens: Sequence[int], entries: Sequence[TokenLogprobs | None] | None) -> torch.Tensor:
    assert entries is not None
    pairs = [(token, entry) for token, entry in zip(tokens, entries, strict=True) if entry is not None]
    return torch.tensor([entry[token].logprob for token, entry in pairs])


def prompts_at_once(llm: LLM, prompts: list[list[int]]) -> list[Judged]:
    """All positions of prompts: whole, or in chunks where the engine's budget is small."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(prompts, params)
    return [Judged(output.prompt_token_ids, 1, _of(output.prompt_token_ids, output.prompt_logprobs))
            for output in outputs]  # fmt: skip


def _made(outputs: list[RequestOutput]) -> list[Judged]:
    found = []
    for output in outputs:
        (made,) = output.outputs
        tokens = output.prompt_token_ids + made.token_ids
        found.append(Judged(tokens, len(output.prompt_token_ids), _of(made.token_ids, made.logprobs)))
    return found


def _forward(seed: int) -> SamplingParams:
    """Tokens as they are drawn, not the most likely ones: a wrong key moves unlikely tokens as well."""
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=DECODED, ignore_eos=True, logprobs=0)


def decoding(llm: LLM, prompts: list[list[int]]) -> list[Judged]:
    """Token by token over the paged cache, together and (two of them) alone."""
    outputs = llm.generate(prompts, [_forward(number) for number in range(len(prompts))])
    outputs += [llm.generate(prompts[number], _forward(100 + number))[0] for number in (3, -1)]
    return _made(outputs)


def after_a_prefix(llm: LLM, prompts: list[list[int]]) -> list[Judged]:
    """The same after a beginning whose keys and values an earlier request left in the prefix cache."""
    begun = [prompt for prompt in prompts if len(prompt) >= 64]
    llm.generate(begun, SamplingParams(temperature=0, max_tokens=1))
    outputs = llm.generate([[*prompt, 9, 8, 7] for prompt in begun], [_forward(number) for number in range(len(begun))])
    for output in outputs:
        assert output.metrics.cached_tokens >= len(output.prompt_token_ids) - 3 - 32, "not found in the cache"
    return _made(outputs)


def of_peer(peer: Any, judged: list[Judged]) -> list[torch.Tensor]:
    """The peer's log-probabilities of the same tokens, each sequence in one pass."""
    found = []
    for item in judged:
        with torch.inference_mode():
            logits = peer(torch.tensor([item.tokens], device=peer.device)).logits[0].float()
        logprobs = logits.log_softmax(-1)[item.first - 1 : item.first - 1 + len(item.found)]
        targets = torch.tensor(item.tokens[item.first : item.first + len(item.found)], device=peer.device)
        found.append(logprobs.gather(1, targets[:, None])[:, 0].cpu())
    return found


def rounded(peer: Any, dtype: torch.dtype) -> Any:
    """`peer` in float32 with weights that `dtype` can hold."""
    with torch.no_grad():
        for weight in peer.parameters():
            weight.copy_(weight.to(dtype))
    return peer


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in units of the mean size of a log-probability."""
    return float((found - wanted).abs().max() / wanted.abs().mean())


def excess(found: torch.Tensor, peer: torch.Tensor, reference: torch.Tensor) -> tuple[float, float, float]:
    """Mean absolute distance from the reference of what was found and of the peer, and by how many standard errors the
    first is above the second (of the differences token by token, so that what both find hard counts once)."""
    mine, theirs = (found - reference).abs(), (peer - reference).abs()
    difference = mine - theirs
    error = float(difference.std()) / len(difference) ** 0.5
    return float(mine.mean()), float(theirs.mean()), float(difference.mean()) / max(error, 1e-12)
