"""Steps that overlap, with every feature on, give what steps one after the other give. On the CPU, whose steps do not
overlap by themselves: the loop is the same and does what it does on a GPU, also by recorded steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from octavo import LLM
from overlap_cases import check_same, everything, run
from tiny_models import GraphedParts, Parts


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    """For its tokenizer and its checks of requests."""
    with LLM(str(tiny_model), dtype="float32", num_blocks=65) as llm:
        yield llm


@pytest.mark.parametrize("num_blocks", [200, 18], ids=["roomy", "short of blocks"])
@pytest.mark.parametrize("parts", [Parts, GraphedParts], ids=["one by one", "recorded"])
def test_every_feature_gives_the_same_with_steps_that_overlap(
    llm: LLM, tiny_model: Path, parts: type[Parts], num_blocks: int
) -> None:
    core = parts(tiny_model, torch.float32).core(num_blocks=num_blocks, max_num_seqs=12, budget=80)
    work = everything(llm, core)
    plain = run(llm, core, work, depth=0)
    overlapped = run(llm, core, work, depth=1)
    check_same(work, plain, overlapped)
    assert min(plain.cached_tokens, overlapped.cached_tokens) > 0
    for done in (plain, overlapped):
        assert (done.preemptions > 0) == (num_blocks == 18)
