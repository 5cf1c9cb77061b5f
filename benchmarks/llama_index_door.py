"""What does a streamed token cost more through LlamaIndex's door than from `LLM.stream` itself?

    python benchmarks/llama_index_door.py [--tokens 256] [--rounds 7] [--json door.json]

Every way streams the same greedy answer of the default model, in turn, in each round. Two figures, in microseconds a
token: the median time between tokens, and the processor time of the thread that takes them (where the door's work is
done; the engine's is on another thread). Events of LlamaIndex are sent, as always; nobody listens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterable, Callable, Iterable
from pathlib import Path
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.llms.octavo import Octavo
from octavo import AsyncLLM, SamplingParams

MESSAGES = [ChatMessage(role="user", content="Write a story about a lighthouse.")]


def timed(stream: Iterable[Any]) -> tuple[float, float]:
    """Median gap, and processor time a token, in microseconds."""
    gaps, began, last = [], time.thread_time(), time.perf_counter()
    for _ in stream:
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    return statistics.median(gaps[1:]) * 1e6, (time.thread_time() - began) / len(gaps) * 1e6


async def atimed(stream: AsyncIterable[Any]) -> tuple[float, float]:
    gaps, began, last = [], time.thread_time(), time.perf_counter()
    async for _ in stream:
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    return statistics.median(gaps[1:]) * 1e6, (time.thread_time() - began) / len(gaps) * 1e6


def measure(tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    sampling = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
    direct = AsyncLLM()
    with Octavo(**sampling) as llm:
        text = llm.messages_to_prompt(MESSAGES)
        ids = llm.engine.tokenizer.encode(text, add_special_tokens=False)
        params = SamplingParams(**sampling)

        async def chat() -> tuple[float, float]:
            return await atimed(await llm.astream_chat(MESSAGES))

        async def plain() -> tuple[float, float]:
            return await atimed(direct.stream({"prompt_token_ids": ids}, params))

        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "LLM.stream": lambda: timed(llm.engine.stream({"prompt_token_ids": ids}, params)),
            "stream_complete": lambda: timed(llm.stream_complete(text, formatted=True)),
            "stream_chat": lambda: timed(llm.stream_chat(MESSAGES)),
            "AsyncLLM.stream": lambda: asyncio.run(plain()),
            "astream_chat": lambda: asyncio.run(chat()),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                result = way()
                if number:  # the first round warms up
                    found[name].append(result)
    direct.close()
    return {
        name: (statistics.median(gap for gap, _ in pairs), statistics.median(cpu for _, cpu in pairs))
        for name, pairs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.tokens, given.rounds)
    print(f"{'us a token':<18}{'between tokens':>16}{'more':>8}{'processor time':>18}{'more':>8}")
    for name, (gap, cpu) in found.items():
        base = found["AsyncLLM.stream" if name.startswith(("a", "A")) else "LLM.stream"]
        print(f"{name:<18}{gap:>16.0f}{gap - base[0]:>8.0f}{cpu:>18.0f}{cpu - base[1]:>8.0f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
