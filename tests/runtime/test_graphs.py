"""Steps that are recorded and replayed give what steps one by one give. On the CPU a recording is a function that is
called again: all but the capture itself runs here."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver
from octavo import SamplingParams
from octavo.execute.context import ForwardContext
from octavo.execute.graphed_runner import GraphedRunner
from octavo.execute.graphs import Shape, sizes_up_to, token_sizes_up_to
from poison_cases import mixed_batches
from tiny_models import FAMILIES, GraphedParts, Parts, make_model

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.7, "logprobs": 2},
    {"temperature": 0, "prompt_logprobs": 1},
    {"temperature": 1.1, "n": 3},
    {"temperature": 0.5, "logit_bias": {7: 2.0}, "min_tokens": 1},
]


def requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    source = random.Random(seed)
    common = [source.randrange(2, 299) for _ in range(40)]
    found = []
    for number in range(count):
        own = [source.randrange(2, 299) for _ in range(source.choice([1, 3, 15, 16, 17, 60, 130]))]
        prompt = common + own if number % 3 == 0 else own
        options = KINDS[number % len(KINDS)] | {"max_tokens": source.randint(1, 24), "ignore_eos": True}
        found.append((prompt, SamplingParams(**options)))
    return found


def tokens_of(core: Any, work: list[tuple[list[int], SamplingParams]]) -> list[list[list[int]]]:
    """All outputs of all requests, submitted a few at a time."""
    driver, made = Driver(core), []
    for number, (prompt, params) in enumerate(work):
        made.append((driver.add(prompt, params, seed=number), params))
        if number % 4 == 3:
            core.step()
    driver.run()
    assert not driver.errors
    return [[driver.tokens[request.request_id, index] for index in range(params.width)] for request, params in made]


@pytest.mark.parametrize("family", ["llama-head-dim", "qwen3", "mistral-window"])
@pytest.mark.parametrize("depth", [0, 1])
def test_replayed_steps_equal_those_one_by_one(family: str, depth: int, tmp_path: Path) -> None:
    path = make_model(family, tmp_path, **FAMILIES[family][1])
    work = requests(5, 24)
    wanted = tokens_of(Parts(path, torch.float32).core(max_num_seqs=16, budget=200), work)
    parts = GraphedParts(path, torch.float32)
    parts.model.fuses_rows = True
    core = parts.core(max_num_seqs=16, budget=200, depth=depth)
    assert isinstance(core.runner, GraphedRunner)
    graphs, replayed = core.runner.graphs, Counter[Shape]()
    for shape, replay in graphs._forward.items():
        graphs._forward[shape] = lambda shape=shape, replay=replay: (replayed.update([shape]), replay())[1]
    assert tokens_of(core, work) == wanted
    assert {shape.decoding for shape in replayed} == {True, False}
    assert {shape.entries for shape in replayed if not shape.decoding} == {8, 16}
    assert replayed.total() == core.steps


@pytest.mark.parametrize("common", [15, 16, 70])
def test_sequences_with_a_common_prefix_share_its_attention(common: int, tmp_path: Path) -> None:
    """And only what all of them share, as they come and go."""
    path = make_model("llama-head-dim", tmp_path)
    prefix = [11 * i % 290 + 4 for i in range(common)]
    work = [([*prefix, 5 + n, 6, 7], SamplingParams(temperature=0, max_tokens=20 + n)) for n in range(12)]
    work.append(([9, 9, 9], SamplingParams(temperature=0, max_tokens=6)))
    wanted = tokens_of(Parts(path, torch.float32).core(), work)
    parts, sent = GraphedParts(path, torch.float32), []
    core = parts.core(depth=1)
    graphs = core.runner.graphs
    graphs._attention.shared_parts = lambda shared, longest: sent.append(shared) or shared // 16
    assert tokens_of(core, work) == wanted
    assert set(sent) == ({common // 16 * 16} if common >= 16 else set())


def test_sequences_that_are_short_enough_have_graphs_of_their_own(tmp_path: Path) -> None:
    """Up to 60 tokens each and from 8 of them on, in this test."""
    path = make_model("llama-head-dim", tmp_path)
    work = [([5 + n] * 30, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)) for n in range(12)]
    wanted = tokens_of(Parts(path, torch.float32).core(), work)
    core = GraphedParts(path, torch.float32, undivided=lambda entries: 60 if entries >= 8 else 0).core(depth=1)
    graphs, lengths = core.runner.graphs, Counter[tuple[bool, bool]]()
    original = graphs._shape_for

    def noted(plan: Any, parts: int, longest: int) -> Shape:
        shape = original(plan, parts, longest)
        if shape.decoding:
            assert shape in graphs._forward
            lengths[shape.undivided, longest <= 60 and shape.entries >= 8] += 1
        return shape

    graphs._shape_for = noted
    assert tokens_of(core, work) == wanted
    assert set(lengths) == {(True, True), (False, False)}


def test_a_pool_that_is_too_small_preempts_and_changes_nothing(tmp_path: Path) -> None:
    path = make_model("llama-head-dim", tmp_path)
    work = [(prompt[:60], params) for prompt, params in requests(6, 20)]
    wanted = tokens_of(Parts(path, torch.float32).core(), work)
    core = GraphedParts(path, torch.float32).core(num_blocks=14, depth=1, max_num_seqs=8)
    assert tokens_of(core, work) == wanted
    assert core.scheduler.preemptions > 3


def test_a_broken_request_fails_alone(tmp_path: Path) -> None:
    path = make_model("qwen2", tmp_path)
    parts = GraphedParts(path, torch.float32)
    good = [[5, 6, 7], [9] * 30, [8]]
    wanted = Driver(parts.core()).generate(good)
    poison = next(token for token in range(2, 299) if all(token not in tokens for tokens in [*wanted, *good]))
    parts.model.embedding[poison] = float("nan")
    core = parts.core(depth=1)
    driver = Driver(core)
    made = [driver.add(prompt) for prompt in good]
    bad = [driver.add([4, poison, 5]), driver.add([poison])]
    driver.run()
    assert [driver.tokens[request.request_id, 0] for request in made] == wanted
    assert set(driver.errors) == {(request.request_id, 0) for request in bad}
    assert all("not finite" in str(error) for error in driver.errors.values())


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("family", ["llama-head-dim", "mistral-window"])
def test_what_nobody_owns_is_never_read(family: str, caching: bool, tmp_path: Path) -> None:
    parts = GraphedParts(make_model(family, tmp_path), torch.float32)
    cores = [parts.core(num_blocks=200, budget=64, depth=1, caching=caching) for _ in range(2)]
    clean, poisoned = (mixed_batches(core, poisoned=core is cores[1]) for core in cores)
    assert poisoned == clean


def test_a_step_that_is_too_long_for_the_graphs_runs_operator_by_operator(tmp_path: Path) -> None:
    """And one that enters more blocks than the staged room has them entered before."""
    path = make_model("llama-head-dim", tmp_path)
    parts = GraphedParts(path, torch.float32)
    prompt = [7 * i % 290 + 5 for i in range(450)]
    wanted = Driver(Parts(path, torch.float32).core(budget=500)).generate([prompt, prompt[:300]])
    core = parts.core(budget=2000, max_num_seqs=16)
    core.runner.graphs._forward = {s: r for s, r in core.runner.graphs._forward.items() if s.tokens < 500}
    assert Driver(core).generate([prompt, prompt[:300]]) == wanted


@pytest.mark.parametrize("most", [1, 2, 5, 8, 64, 100, 256])
def test_there_is_a_graph_for_every_number_of_rows(most: int) -> None:
    sizes = sizes_up_to(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert all(later - size <= min(32, max(8, size / 2)) for size, later in pairwise(sizes))
    tokens = token_sizes_up_to(4096)
    assert all(later / size <= 2 for size, later in pairwise(tokens))


def test_steps_are_told_apart_by_what_they_need(tmp_path: Path) -> None:
    """One model run a graph, whatever the step: the context says which."""
    path = make_model("llama-head-dim", tmp_path)
    parts, seen = GraphedParts(path, torch.float32), []

    class Watched:
        logits = parts.model.logits

        def forward(self, context: ForwardContext) -> torch.Tensor:
            seen.append((context.inputs.input_ids.shape[0], context.inputs.max_query_len))
            result: torch.Tensor = parts.model.forward(context)
            return result

    core = parts.core(model=Watched(), max_num_seqs=16, budget=100)
    seen.clear()
    Driver(core).generate([[5] * 20] * 3, SamplingParams(temperature=0, max_tokens=3))
    # the first alone, as the others wait for its block; they run beside its next token
    assert seen[0] == (32, 32)
    assert seen[-1][1] == 1
