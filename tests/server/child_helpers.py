"""Engines in child processes for the tests here."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from octavo import SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.config import engine_config_from
from octavo.engine.child.placement import InChild
from octavo.engine.child.service import ChildService

SETTINGS = {"device": "cpu", "dtype": "float32", "block_size": 16, "num_blocks": 401, "deterministic": True}
"""No other test has an engine like it: these are killed, and engines are shared."""


def service_of(llm: AsyncLLM) -> ChildService:
    service = llm.engine.service
    assert isinstance(service, ChildService)
    return service


def pid_of(llm: AsyncLLM) -> int:
    """Of the engine's process, which must run: a signal to 0 would be for the tests themselves."""
    pid = service_of(llm).pid
    assert pid is not None
    return pid


@contextmanager
def child(model: Path, placement: InChild | None = None, **settings: Any) -> Iterator[AsyncLLM]:
    llm = AsyncLLM.of(engine_config_from(str(model), {**SETTINGS, **settings}), placement or InChild())
    try:
        yield llm
    finally:
        llm.close()


@contextmanager
def here(model: Path, **settings: Any) -> Iterator[AsyncLLM]:
    llm = AsyncLLM.of(engine_config_from(str(model), {**SETTINGS, **settings}))
    try:
        yield llm
    finally:
        llm.close()


def essence(output: Any) -> Any:
    """What a caller sees of an output, but for ids and times."""
    return (
        [(one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason, one.logprobs) for one in
         output.outputs],
        output.prompt_logprobs,
    )  # fmt: skip


async def wait_for_spare(seconds: float = 30) -> None:
    """Until the process in advance has imported what it needs: a death before that costs its start."""
    from octavo.engine.child.processes import SPARES

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        spare = SPARES._spare
        if spare is not None and "torch" in Path(f"/proc/{spare[1].pid}/maps").read_text():
            await asyncio.sleep(1)
            return
        await asyncio.sleep(0.1)
    raise AssertionError("there is no process in advance")


@asynccontextmanager
async def killing(llm: AsyncLLM, signals: Sequence[int], pause: float) -> AsyncIterator[None]:
    """Sends these signals to the engine's process, one after the other, meanwhile."""

    async def kill() -> None:
        for one in signals:
            await asyncio.sleep(pause)
            while (pid := service_of(llm).pid) is None:
                await asyncio.sleep(0.05)
            os.kill(pid, one)

    task = asyncio.create_task(kill())
    try:
        yield
    finally:
        await task


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    """All kinds of them, of some hundred steps."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"temperature": 1.3, "top_k": 40}, {"n": 3, "best_of": 3}, {"logprobs": 3},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.5}, {"prompt_logprobs": 2}, {"min_tokens": 30},
        {"stop_token_ids": [77, 78], "n": 2}, {"no_repeat_ngram_size": 3}, {"top_p": 0.7, "logit_bias": {9: 2.0}},
        {"use_beam_search": True, "n": 2, "beam_width": 3, "temperature": 0.0, "max_tokens": 40},
        {"structured_outputs": "regex", "ignore_eos": False},
    ]  # fmt: skip
    found = []
    for number in range(count):
        options: dict[str, Any] = {"max_tokens": 120, "ignore_eos": True, "seed": number, **kinds[number % len(kinds)]}
        if "structured_outputs" in options:
            from octavo.structured_outputs import StructuredOutputsParams

            options["structured_outputs"] = StructuredOutputsParams(regex="([a-f]{3,9} ){4,30}")
        prompt = [3 + (number * 7 + place * place) % 290 for place in range(5 + number % 40)]
        found.append((prompt, SamplingParams(**options)))
    return found
