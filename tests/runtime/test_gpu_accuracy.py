"""On a GPU: how close every native family comes to transformers on the same card, by every way that keys and values can
take, and that neither garbage in free blocks nor overlap changes anything. Skipped elsewhere.

In float32 the largest difference of a log-probability is below 1e-3 of their mean size. In bfloat16 the measure is the
mean absolute difference from transformers in float32 with the same, rounded, weights: over all positions of a way,
the engine's must not be above that of transformers in bfloat16 by more than three standard errors of the mean of the
differences token by token, which is what so many tokens can tell apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from logprob_paths import (
    Judged,
    after_a_prefix,
    decoding,
    excess,
    of_peer,
    prompts_at_once,
    prompts_of_many_lengths,
    relative_error,
    rounded,
)
from octavo import LLM
from overlap_cases import check_same, everything, run
from poison_cases import mixed_batches
from tiny_models import FAMILIES, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def peer_of(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).cuda().eval()


def watched(llm: LLM) -> Counter[str]:
    """Counts the engine's steps that are replayed and those that run operator by operator."""
    counts: Counter[str] = Counter()

    def watch(core: Any) -> None:
        graphs = core.runner.graphs
        shape_for, original = graphs._shape_for, graphs._run
        graphs._run = lambda *arguments: (counts.update(["operators"]), original(*arguments))[1]

        def counted(plan: Any, parts: int, longest: int) -> Any:
            shape = shape_for(plan, parts, longest)
            counts.update(["decoding" if shape.decoding else "prompts"] if shape in graphs._forward else [])
            return shape

        graphs._shape_for = counted

    llm.engine.service.call(watch)
    return counts


def by_every_way(path: Path, dtype: str) -> dict[str, list[Judged]]:
    prompts, settings = prompts_of_many_lengths(), {"dtype": dtype, "max_num_seqs": 16}
    found: dict[str, list[Judged]] = {}
    with LLM(str(path), max_num_batched_tokens=2048, **settings) as llm:
        assert llm.engine.limits.device == "cuda"
        counts = watched(llm)
        ways: dict[str, Callable[[LLM, list[list[int]]], list[Judged]]] = {
            "whole prompts": prompts_at_once, "decoding": decoding, "after a prefix": after_a_prefix,
        }  # fmt: skip
        for name, way in ways.items():
            found[name] = way(llm, prompts)
        assert counts["operators"] == 0, "not replayed"
        assert counts["decoding"] > 100
        assert counts["prompts"] >= 3
    with LLM(str(path), max_num_batched_tokens=48, **settings) as llm:
        steps = llm.stats().steps
        found["in chunks"] = prompts_at_once(llm, prompts)
        assert llm.stats().steps - steps > sum(map(len, prompts)) / 48 - 1
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_float32_equals_transformers_by_every_way(family: str, tmp_path: Path) -> None:
    path = make_model(family, tmp_path)
    peer = peer_of(path, torch.float32)
    for way, judged in by_every_way(path, "float32").items():
        found, wanted = torch.cat([item.found for item in judged]), torch.cat(of_peer(peer, judged))
        assert len(found) > 350
        error = relative_error(found, wanted)
        print(f"{family}, {way}: {len(found)} tokens, largest difference {error:.1e} of the mean size")
        assert error < 1e-3, way


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bfloat16_is_no_farther_from_float32_than_transformers_bfloat16(family: str, tmp_path: Path) -> None:
    path = make_model(family, tmp_path)
    peer, reference = peer_of(path, torch.bfloat16), rounded(peer_of(path, torch.float32), torch.bfloat16)
    far = []
    for way, judged in by_every_way(path, "bfloat16").items():
        found = torch.cat([item.found for item in judged])
        mine, theirs, errors = excess(found, torch.cat(of_peer(peer, judged)), torch.cat(of_peer(reference, judged)))
        print(f"{family}, {way}: {len(found)} tokens, {mine:.4f}, transformers {theirs:.4f} ({errors:+.1f} errors)")
        if errors > 3:
            far.append((way, mine, theirs, errors))
    assert far == []


def test_a_long_prompt_by_the_library_is_no_farther_either(tmp_path: Path) -> None:
    path = make_model("llama-head-dim", tmp_path, max_position_embeddings=8192, head_dim=64)
    prompt = prompts_of_many_lengths(5000)[-1]
    peer, reference = peer_of(path, torch.bfloat16), rounded(peer_of(path, torch.float32), torch.bfloat16)
    with LLM(str(path), dtype="bfloat16", max_num_seqs=4, max_num_batched_tokens=5120) as llm:
        assert llm.engine.service.call(lambda core: core.runner.attention.library)
        judged = prompts_at_once(llm, [prompt])
    (found,), (theirs,), (wanted,) = [judged[0].found], of_peer(peer, judged), of_peer(reference, judged)
    mine, other, errors = excess(found, theirs, wanted)
    print(f"{len(found)} tokens, {mine:.4f}, transformers {other:.4f} ({errors:+.1f} errors)")
    assert errors <= 3


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("family", ["llama-head-dim", "mistral-window"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_nobody_owns_is_never_read(dtype: str, family: str, caching: bool, tmp_path: Path) -> None:
    """To the bit: the same steps, only that free blocks are full of NaN."""
    path = make_model(family, tmp_path)
    settings: dict[str, Any] = {
        "dtype": dtype, "enable_prefix_caching": caching, "num_blocks": 400, "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
    }  # fmt: skip
    found = []
    for poisoned in (False, True):
        with LLM(str(path), **settings) as llm:
            found.append(llm.engine.service.call(lambda core, p=poisoned: mixed_batches(core, poisoned=p, longest=400)))
    assert found[1] == found[0]


@pytest.mark.parametrize("num_blocks", [400, 20], ids=["roomy", "short of blocks"])
def test_every_feature_gives_the_same_with_steps_that_overlap(num_blocks: int, tmp_path: Path) -> None:
    """In float32, where products of other batches differ by less than a token can turn on."""
    path = make_model("llama-head-dim", tmp_path)
    settings: dict[str, Any] = {"max_num_seqs": 12, "max_num_batched_tokens": 80, "num_blocks": num_blocks}
    with LLM(str(path), dtype="float32", **settings) as llm:
        call = llm.engine.service.call
        assert call(lambda core: core.depth) == 1
        work = call(lambda core: everything(llm, core))
        plain, overlapped = (call(lambda core, depth=depth: run(llm, core, work, depth=depth)) for depth in (0, 1))
    check_same(work, plain, overlapped)
    assert min(plain.cached_tokens, overlapped.cached_tokens) > 0
    for done in (plain, overlapped):
        assert (done.preemptions > 0) == (num_blocks == 20)
