"""Sampled tokens follow the distribution that the parameters define, by an independent computation in numpy.

Through the whole engine: one request with many seeds, each of one token, against the logits that the engine saw.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_driver import Driver
from octavo import LLM, SamplingParams
from octavo.engine.plan import NewRow
from octavo.errors import RequestFailedError
from scipy.stats import chisquare
from tiny_models import Parts

PROMPT = [10, 20, 30, 30, 40, 40, 40, 9]
DRAWS = 4000


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    return Parts(tiny_model, torch.float32)


def distribution(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """Probabilities of the next token, by the definitions in `SamplingParams`' docstring and the papers."""
    x = logits.astype(np.float64).copy()
    if params.allowed_token_ids is not None:
        keep = np.zeros(len(x), bool)
        keep[list(params.allowed_token_ids)] = True
        x[~keep] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    x /= params.temperature
    if params.min_p > 0:
        p = np.exp(x - x.max())
        x[p < params.min_p * p.max()] = -np.inf
    if params.top_k > 0:
        x[x < np.sort(x)[::-1][params.top_k - 1]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        needed = int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1
        p[order[needed:]] = 0.0
        p /= p.sum()
    return p


def follows(counts: np.ndarray, p: np.ndarray) -> None:
    """Chi-square at one in a million, tokens too rare for it taken together; nothing impossible was drawn."""
    assert counts[p == 0].sum() == 0, "a token of probability zero was drawn"
    expected = p * counts.sum()
    common = expected >= 8
    observed, wanted = counts[common].tolist(), expected[common].tolist()
    if expected[~common].sum() >= 8:
        observed.append(counts[~common].sum())
        wanted.append(expected[~common].sum())
    if len(wanted) == 1:
        return
    scale = sum(observed) / sum(wanted)
    assert chisquare(observed, np.array(wanted) * scale).pvalue > 1e-6


def draw(parts: Parts, params: dict[str, Any], *, output: int = 0) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Counts of the token after `output` greedy ones, over `DRAWS` seeds; its logits; the greedy tokens."""
    made: list[int] = []
    if output:
        made = Driver(parts.core()).generate(
            [PROMPT], SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        )[0]
    core = parts.core(num_blocks=400, max_num_seqs=250, budget=2500)
    driver = Driver(core, record=True)
    row = SamplingParams(max_tokens=1, ignore_eos=True, **params)
    if output:  # made tokens count as output: say so where rows are made
        original = core.scheduler.new_row
        core.scheduler.new_row = lambda s: _with_prompt(original(s), len(PROMPT))  # type: ignore[method-assign]
    requests = [driver.add(PROMPT + made, row, seed=seed * 7919) for seed in range(DRAWS)]
    driver.run()
    counts = np.zeros(parts.config.vocab_size)
    for request in requests:
        counts[driver.tokens[request.request_id, 0][0]] += 1
    logits = [driver.logits[request.request_id, 0][len(PROMPT) + output].numpy() for request in requests[:2]]
    return counts, logits, made


def _with_prompt(new: NewRow, count: int) -> NewRow:
    return NewRow(new.row, new.tokens, count, new.params, new.seed, new.wants_logprobs, new.stop_ids, new.bad_word_ids)


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"logit_bias": {7: 6.0, 8: -50.0, 40: 3.0}},
    {"allowed_token_ids": [5, 6, 7, 100]},
    {"repetition_penalty": 1.8, "temperature": 1.3},
    {"repetition_penalty": 0.6},
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_tokens_follow_the_distribution(parts: Parts, params: dict[str, Any]) -> None:
    counts, logits, _ = draw(parts, params)
    follows(counts, distribution(logits[0], SamplingParams(**params), PROMPT, []))
    if params in ({}, {"temperature": 1.7}):
        assert (counts > 0).sum() > 20, "the distribution is a point: a weak test"


@pytest.mark.parametrize(
    "params", [{"presence_penalty": 1.5}, {"frequency_penalty": 1.0}, {"frequency_penalty": -1.0},
               {"presence_penalty": -0.5, "frequency_penalty": 0.8, "repetition_penalty": 1.2}], ids=str,
)  # fmt: skip
def test_penalties_count_the_output(parts: Parts, params: dict[str, Any]) -> None:
    """Twelve tokens were made; presence and frequency count these only, repetition the prompt's too."""
    counts, logits, made = draw(parts, params, output=12)
    assert np.array_equal(logits[0], logits[1])
    follows(counts, distribution(logits[0], SamplingParams(**params), PROMPT, made))


def test_penalties_through_a_whole_output(parts: Parts) -> None:
    """Greedy with penalties: each of 60 tokens is the best of the logits which numpy penalises."""
    params = SamplingParams(
        temperature=0.0, max_tokens=60, ignore_eos=True, repetition_penalty=1.4, presence_penalty=0.7,
        frequency_penalty=0.6,
    )  # fmt: skip
    driver = Driver(parts.core(), record=True)
    request = driver.add(PROMPT, params)
    driver.run()
    made, warm = driver.tokens[request.request_id, 0], SamplingParams(
        repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.6
    )  # fmt: skip
    for place, token in enumerate(made):
        logits = driver.logits[request.request_id, 0][len(PROMPT) + place].numpy()
        assert distribution(logits, warm, PROMPT, made[:place]).argmax() == token
    plain = Driver(parts.core()).generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    assert plain[0] != made


def test_draws_of_neighbouring_positions_outputs_and_seeds_are_independent(parts: Parts) -> None:
    """A uniform choice of two tokens, 128 outputs of 40 tokens: every correlation is that of fair coins."""
    params = SamplingParams(temperature=1e6, allowed_token_ids=[50, 51], n=128, max_tokens=40, ignore_eos=True)
    driver = Driver(parts.core(num_blocks=600, max_num_seqs=128, budget=256))
    request = driver.add(PROMPT, params, seed=1)
    driver.run()
    coins = np.array([driver.tokens[request.request_id, i] for i in range(128)]) - 50
    assert set(coins.flatten()) == {0, 1}
    signs = 2.0 * coins - 1
    bound = 5.5  # standard deviations; 128 * 127 / 2 pairs are looked at
    assert abs(signs.sum()) < bound * math.sqrt(signs.size)
    between_outputs = signs @ signs.T - 40 * np.eye(128)
    between_positions = signs.T @ signs - 128 * np.eye(40)
    assert np.abs(between_outputs).max() < bound * math.sqrt(40)
    assert np.abs(between_positions).max() < bound * math.sqrt(128)


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(tiny_model: Path) -> None:
    params = [SamplingParams(seed=seed, max_tokens=20, temperature=1.2) for seed in (1, 2, 2**62, -5)]
    with LLM(str(tiny_model), dtype="float32", seed=3) as llm:
        one = [llm.generate(PROMPT, p)[0].outputs[0].token_ids for p in params]
        noise = [SamplingParams(max_tokens=9, temperature=0.8)] * 20
        together = llm.generate([PROMPT] * 24, [*noise[:10], *params, *noise[10:]])[10:14]
        assert [output.outputs[0].token_ids for output in together] == one
        assert len({tuple(tokens) for tokens in one}) == 4
        n = llm.generate(PROMPT, SamplingParams(seed=1, max_tokens=20, temperature=1.2, n=4))[0].outputs
        assert n[0].token_ids == one[0], "the first of n is not the single one"
        assert len({tuple(output.token_ids) for output in n}) == 4


def test_without_a_seed_the_engines_seed_decides(tiny_model: Path) -> None:
    outputs = []
    for seed in (1, 1, 2):
        with LLM(str(tiny_model), dtype="float32", seed=seed) as llm:
            params = SamplingParams(max_tokens=16, temperature=1.5)
            outputs.append([o.outputs[0].token_ids for o in llm.generate([PROMPT] * 3, params)])
    assert outputs[0] == outputs[1] != outputs[2]
    assert len({tuple(tokens) for tokens in outputs[0]}) == 3


def test_a_request_that_forbids_every_token_fails_alone(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32") as llm:
        impossible = SamplingParams(
            allowed_token_ids=[1], min_tokens=2, max_tokens=4, temperature=1.0
        )  # the only token allowed ends the text
        good = SamplingParams(temperature=0.0, max_tokens=8)
        alone = llm.generate(PROMPT, good)[0].outputs[0].token_ids
        first, second = llm.generate([PROMPT, PROMPT], [impossible, good], return_exceptions=True)
        assert isinstance(first, RequestFailedError)
        assert "forbids every token" in str(first)
        assert second.outputs[0].token_ids == alone
        assert llm.stats().blocks_used == 0
