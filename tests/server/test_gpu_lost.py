"""A kernel that fails ends a GPU's context: the engine's process is replaced, and nobody else loses anything."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from child_helpers import child, pid_of, service_of, wait_for_spare
from octavo import SamplingParams
from octavo.engine.child.placement import InChild
from octavo.errors import RequestFailedError
from poisoned_engine import LOSES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
POISONED = InChild((sys.executable, str(Path(__file__).with_name("poisoned_engine.py"))))
PARAMS = SamplingParams(max_tokens=200, ignore_eos=True, seed=4, temperature=0.0)
SETTINGS: dict[str, Any] = {"device": "cuda", "dtype": "float32", "deterministic": True}


def test_others_go_on_in_a_new_process(tiny_model: Path) -> None:
    prompts = [[5 + number, 9, 11] for number in range(4)]

    async def scene() -> None:
        with child(tiny_model, POISONED, **SETTINGS) as llm:
            wanted = [output.outputs[0].token_ids for output in await llm.generate(prompts, PARAMS)]
            *found, failed = await llm.generate([*prompts, [LOSES]], PARAMS, return_exceptions=True)
            assert isinstance(failed, RequestFailedError)
            assert [output.outputs[0].token_ids for output in found] == wanted
            assert service_of(llm).restarts >= 2

    asyncio.run(scene())


def test_a_stream_on_a_gpu_outlives_its_process(tiny_model: Path) -> None:
    async def scene() -> tuple[float, bool]:
        with child(tiny_model, **SETTINGS) as llm:
            [alone] = await llm.generate([[5, 9]], PARAMS)
            await wait_for_spare()
            tokens: list[int] = []
            last, longest = time.monotonic(), 0.0
            async for piece in llm.stream([5, 9], PARAMS):
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
                before, tokens = len(tokens), [*tokens, *piece.token_ids]
                if before < 50 <= len(tokens):
                    os.kill(pid_of(llm), 9)
            return longest, tokens == alone.outputs[0].token_ids

    longest, equal = asyncio.run(scene())
    print(f"{longest:.2f} s without a token")
    assert equal
    assert longest < 15, "the graphs of a tiny model are recorded anew in seconds"
