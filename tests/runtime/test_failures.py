"""A request on which the model fails, fails alone: its neighbours' tokens are those of their solo runs, nothing of it
stays in the cache, and every block is free afterwards.

The model is real. Token `NAN` has an embedding that is not a number, token `INF` one that is infinite: whoever has it
in the prompt, or makes it, spoils keys, values and states. Token `RAISE` makes the forward pass raise.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM, AsyncLLM, SamplingParams
from octavo.decode.processors import LogitsProcessor, processors_for
from octavo.engine.core import EngineCore
from octavo.engine.plan import NewRow
from octavo.errors import EngineClosedError, RequestFailedError
from octavo.execute.context import ForwardContext
from safetensors.torch import load_file, save_file

NAN, INF, RAISE = 250, 251, 252
KINDS = {"nan": NAN, "inf": INF, "raise": RAISE}
NEVER = dict.fromkeys(KINDS.values(), -1e4)
PROMPTS = [[(i * j) % 240 + 2 for i in range(length)] for j, length in ((3, 5), (5, 40), (7, 17), (9, 64), (11, 33))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logit_bias=NEVER)
SAMPLED = SamplingParams(seed=3, n=2, max_tokens=24, ignore_eos=True, logit_bias=NEVER)


class Raiser:
    """The real model; raises when token `RAISE` is computed, after the cache was written or before."""

    def __init__(self, model: Any, *, late: bool) -> None:
        self.model, self.late, self.raised = model, late, 0
        self.logits = model.logits

    def forward(self, context: ForwardContext) -> torch.Tensor:
        guilty = bool((context.inputs.input_ids == RAISE).any())
        self.raised += guilty
        if guilty and not self.late:
            raise ArithmeticError("token 252 is not to be computed")
        hidden: torch.Tensor = self.model.forward(context)
        if guilty:
            raise ArithmeticError("token 252 is not to be computed")
        return hidden


@pytest.fixture(scope="module")
def fragile_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fragile") / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN] = float("nan")
    tensors["model.embed_tokens.weight"][INF] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(params=["roomy", "short of blocks", "in chunks"])
def llm(fragile_model: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    settings: dict[str, Any] = {
        "roomy": {"num_blocks": 129}, "short of blocks": {"num_blocks": 12},
        "in chunks": {"num_blocks": 129, "max_num_batched_tokens": 16, "max_num_seqs": 16},
    }[request.param]  # fmt: skip
    with LLM(str(fragile_model), dtype="float32", block_size=16, **settings) as llm:
        wrap(llm, late=True)
        yield llm
        nothing_is_left(llm)


def wrap(llm: LLM, *, late: bool) -> Raiser:
    def change(core: EngineCore) -> Raiser:
        runner: Any = core.runner
        runner.model = Raiser(getattr(runner.model, "model", runner.model), late=late)
        return runner.model  # type: ignore[no-any-return]

    return llm.engine.service.call(change)


def nothing_is_left(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
    assert llm.engine.service.call(lambda core: len(core.scheduler.suspects)) == 0
    assert not llm.engine.service._open


def clear_cache(llm: LLM) -> None:
    llm.engine.service.call(lambda core: core.scheduler.pool.clear_cache())


def tokens(output: Any) -> list[list[int]]:
    assert not isinstance(output, BaseException), output
    return [choice.token_ids for choice in output.outputs]


def solo(llm: LLM, params: SamplingParams) -> list[list[list[int]]]:
    found = []
    for prompt in PROMPTS:
        clear_cache(llm)
        found.append(tokens(llm.generate(prompt, params)[0]))
    clear_cache(llm)
    return found


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "n=2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_prompt_fails_alone(llm: LLM, kind: str, params: SamplingParams) -> None:
    """Guilty ones stand between the others; some begin like an innocent one, and share its blocks."""
    expected = solo(llm, params)
    bad = KINDS[kind]
    guilty = [[bad], [*PROMPTS[3], bad], [*PROMPTS[3][:20], bad, *PROMPTS[3][20:]], [5] * 30 + [bad]]
    batch = [PROMPTS[0], guilty[0], PROMPTS[1], guilty[1], PROMPTS[2], PROMPTS[3], guilty[2], guilty[3], PROMPTS[4]]
    for _ in range(2):  # the second time, much of it comes from the cache
        outputs: list[Any] = llm.generate(batch, params, return_exceptions=True)
        for prompt, output in zip(batch, outputs, strict=True):
            if prompt in guilty:
                assert isinstance(output, RequestFailedError), prompt
                assert ("252" if kind == "raise" else "finite") in str(output)
                assert isinstance(output.__cause__, ArithmeticError) == (kind == "raise")
            else:
                assert tokens(output) == expected[PROMPTS.index(prompt)], f"{len(prompt)} tokens"
        nothing_is_left(llm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_comes_upon_it_later_fails_alone(llm: LLM, kind: str) -> None:
    """The guilty one makes the token itself, after eight good ones: these were sent; then it fails."""
    expected = solo(llm, GREEDY)
    (good,) = llm.generate(PROMPTS[1], GREEDY)
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    # the penalty grows with every token made, until the bad token is the best
    bad = KINDS[kind]
    turning = SamplingParams(
        temperature=0.0, max_tokens=24, ignore_eos=True, allowed_token_ids=[7, bad], logit_bias={7: 107.0, bad: 92.0},
        frequency_penalty=2.0,
    )  # fmt: skip
    stream = llm.stream(PROMPTS[4], turning)
    streams += [llm.stream(prompt, GREEDY) for prompt in PROMPTS[2:]]
    with pytest.raises(RequestFailedError):
        list(stream)
    made = stream.output.outputs[0].token_ids
    assert made[0] == 7
    assert set(made[:-1]) == {7}
    assert made[-1] == bad, "it did not fail by the token which it made"
    with pytest.raises(RequestFailedError):
        next(stream)
    for number, other in enumerate(streams):
        list(other)
        assert tokens(other.output) == expected[number]
    assert tokens(llm.generate(PROMPTS[1], GREEDY)[0]) == tokens(good)


def test_blocks_of_the_failed_are_clean_for_the_next(fragile_model: Path) -> None:
    """A pool of 6 blocks: the next owner gets those which were full of NaN."""
    for _ in range(2):
        with LLM(str(fragile_model), dtype="float32", block_size=16, num_blocks=7) as llm:
            expected = tokens(llm.generate(PROMPTS[3], GREEDY)[0])
            clear_cache(llm)
            for length in (70, 33, 90):
                with pytest.raises(RequestFailedError):
                    llm.generate([NAN] * length, GREEDY)
                assert llm.stats().blocks_cached == 0, "what the failed one wrote can be found"
                assert tokens(llm.generate(PROMPTS[3], GREEDY)[0]) == expected
                clear_cache(llm)


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
def test_every_neighbour_of_one_that_raises_is_run_alone_once(fragile_model: Path, late: bool) -> None:
    """The whole batch fails once; the search for the guilty one costs a step for each, not a storm of failures."""
    with LLM(str(fragile_model), dtype="float32", block_size=16, num_blocks=129) as llm:
        expected = solo(llm, GREEDY)
        model = wrap(llm, late=late)
        outputs: list[Any] = llm.generate([[5, RAISE], *PROMPTS], GREEDY, return_exceptions=True)
        assert isinstance(outputs[0], RequestFailedError)
        assert [tokens(output) for output in outputs[1:]] == expected
        assert 1 <= model.raised <= 3
        nothing_is_left(llm)


class BrokenProcessor:
    def __init__(self, after: int) -> None:
        self.after = after

    def apply(self, logits: torch.Tensor, history: torch.Tensor, length: int) -> None:
        if length >= self.after:
            raise LookupError("the processor is broken")


@pytest.mark.parametrize("after", [0, 50], ids=["at once", "after some tokens"])
@pytest.mark.parametrize("where", ["making", "applying"])
def test_a_broken_processor_fails_its_own_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str, after: int
) -> None:
    mark = 299

    def broken(new: NewRow, vocab_size: int, device: torch.device) -> tuple[LogitsProcessor, ...]:
        if mark not in (new.params.logit_bias or {}):
            return processors_for(new, vocab_size, device)
        if where == "making" and len(new.tokens) >= 40:
            raise LookupError("the processor is broken")
        return (BrokenProcessor(after),)

    expected = solo(llm, GREEDY)
    monkeypatch.setattr("octavo.decode.row.processors_for", broken)
    guilty = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logit_bias={mark: 1.0})
    batch = [PROMPTS[0], PROMPTS[1], *PROMPTS[1:]]
    params = [GREEDY, guilty, *[GREEDY] * 4]
    outputs: list[Any] = llm.generate(batch, params, return_exceptions=True)
    assert isinstance(outputs[1], RequestFailedError)
    assert isinstance(outputs[1].__cause__, LookupError)
    assert [tokens(output) for output in [outputs[0], *outputs[2:]]] == expected


def test_an_async_caller_gets_the_error_and_its_neighbours_their_tokens(fragile_model: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(str(fragile_model), dtype="float32", num_blocks=65) as llm:
            (alone,) = await llm.generate(PROMPTS[1], GREEDY)
            tasks = [llm.generate(prompt, GREEDY) for prompt in (PROMPTS[1], [5, NAN], PROMPTS[1])]
            one, bad, two = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(bad, RequestFailedError)
            assert tokens(one[0]) == tokens(two[0]) == tokens(alone)  # type: ignore[index]
            with pytest.raises(RequestFailedError):
                async for _ in llm.stream([5, NAN], GREEDY):
                    pass
            assert llm.stats().blocks_used == 0

    asyncio.run(main())


def test_when_the_loop_itself_breaks_everybody_hears_of_it(fragile_model: Path) -> None:
    """An error of the engine's own: no request can go on, nobody waits for ever, and a new LLM is a new engine."""
    with LLM(str(fragile_model), dtype="float32", num_blocks=65) as llm:
        expected = tokens(llm.generate(PROMPTS[1], GREEDY)[0])
        streams = [llm.stream(prompt, SamplingParams(max_tokens=400, ignore_eos=True)) for prompt in PROMPTS]
        next(streams[0])

        def break_it(core: EngineCore) -> None:
            core.scheduler.commit = None  # type: ignore[method-assign, assignment]

        llm.engine.service.call(break_it)
        for stream in streams:
            with pytest.raises(EngineClosedError) as caught:
                list(stream)
            assert isinstance(caught.value.__cause__, TypeError)
        with pytest.raises(EngineClosedError, match="not callable"):
            llm.generate(PROMPTS[0], GREEDY)
        with LLM(str(fragile_model), dtype="float32", num_blocks=65) as other:
            assert tokens(other.generate(PROMPTS[1], GREEDY)[0]) == expected
