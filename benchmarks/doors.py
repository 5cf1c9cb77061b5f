"""What do the doors cost? LangChain's and LlamaIndex's classes beside `LLM` itself, on the default model.

    python benchmarks/doors.py [--tokens 64] [--rounds 30] [--requests 64] [--profile] [--json doors.json]

A streamed token: each round streams the same greedy answer by every way, and right before and after it by `LLM.stream`
(or `AsyncLLM.stream`), because a machine's speed drifts by more than a door costs. Two figures, in microseconds a
token, above the mean of those two: the time between tokens, and the processor time of the thread that takes them
(where the door's work is done; the engine's is on another thread). Medians over the rounds, with the middle half of
them in brackets. Callbacks and events are sent, as always; nobody listens.

Many at once: the same requests given to `LLM.generate` at once, and as that many concurrent `ainvoke`s, in turn.

A framework that is not installed is left out. --profile shows where LangChain's streaming spends its time.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import AsyncIterable, Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octavo import LLM, AsyncLLM, SamplingParams

QUESTION = "Write a story about a lighthouse."
MESSAGES = [{"role": "user", "content": QUESTION}]
Cost = tuple[float, float]
Way = Callable[[], Cost]


class Meter:
    """Median gap between tokens, and processor time of this thread a token, in microseconds."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.began, self.last = time.thread_time(), time.perf_counter()

    def token(self) -> None:
        now = time.perf_counter()
        self.gaps.append(now - self.last)
        self.last = now

    def cost(self) -> Cost:
        used = time.thread_time() - self.began
        return statistics.median(self.gaps[1:]) * 1e6, used / len(self.gaps) * 1e6


def timed(stream: Iterable[Any]) -> Cost:
    meter = Meter()
    for _ in stream:
        meter.token()
    return meter.cost()


async def atimed(stream: AsyncIterable[Any]) -> Cost:
    meter = Meter()
    async for _ in stream:
        meter.token()
    return meter.cost()


def langchain_ways(sampling: dict[str, Any]) -> dict[str, Way]:
    from langchain_octavo import ChatOctavo, OctavoLLM

    chat, llm = ChatOctavo(**sampling), OctavoLLM(**sampling)
    text = chat._shared().llm.chat_prompt(MESSAGES, {"add_generation_prompt": True})["prompt"]

    async def astream() -> Cost:
        return await atimed(chat.astream(QUESTION))

    return {
        "ChatOctavo.stream": lambda: timed(chat.stream(QUESTION)),
        "ChatOctavo.astream": lambda: asyncio.run(astream()),
        "ChatOctavo v3 events": lambda: timed(chat.stream_events(QUESTION, version="v3")),
        "OctavoLLM.stream": lambda: timed(llm.stream(text)),
    }


def llama_index_ways(sampling: dict[str, Any]) -> dict[str, Way]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.octavo import Octavo

    llm = Octavo(**sampling)
    messages = [ChatMessage(role="user", content=QUESTION)]
    text = llm.messages_to_prompt(messages)

    async def astream() -> Cost:
        return await atimed(await llm.astream_chat(messages))

    return {
        "Octavo.stream_chat": lambda: timed(llm.stream_chat(messages)),
        "Octavo.astream_chat": lambda: asyncio.run(astream()),
        "Octavo.stream_complete": lambda: timed(llm.stream_complete(text, formatted=True)),
    }


def streams(
    llm: LLM, asynchronous: AsyncLLM, tokens: int, rounds: int
) -> tuple[dict[str, Cost], dict[str, list[Cost]]]:
    """Of the plain ways the cost, medians; of each door what it costs more, round by round."""
    sampling = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
    params = SamplingParams(**sampling)

    async def stream() -> Cost:
        return await atimed(asynchronous.chat_stream(MESSAGES, params))

    plain: dict[bool, Way] = {
        False: lambda: timed(llm.chat(MESSAGES, params, stream=True)),
        True: lambda: asyncio.run(stream()),
    }
    ways: dict[str, Way] = {}
    for name, make in (("langchain_core", langchain_ways), ("llama_index", llama_index_ways)):
        if find_spec(name) is not None:
            ways |= make(sampling)
    base: dict[bool, list[Cost]] = {False: [], True: []}
    more: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            awaited = ".a" in name
            before, (gap, cpu), after = plain[awaited](), way(), plain[awaited]()
            if number:  # the first round warms up
                base[awaited] += [before, after]
                more[name].append((gap - (before[0] + after[0]) / 2, cpu - (before[1] + after[1]) / 2))
    medians = {("Async" if awaited else "") + "LLM.stream": middle(costs) for awaited, costs in base.items()}
    return medians, more


def middle(costs: list[Cost]) -> Cost:
    return statistics.median(gap for gap, _ in costs), statistics.median(cpu for _, cpu in costs)


def spread(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.0f} ({low:.0f}..{high:.0f})"


def many(llm: LLM, requests: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for all requests, of each round."""
    from langchain_octavo import ChatOctavo

    questions = [f"{QUESTION} Its number is {number}." for number in range(requests)]
    sampling = {"temperature": 0.0, "max_tokens": 64, "ignore_eos": True}
    chat = ChatOctavo(**sampling)

    async def gather() -> list[Any]:
        return await asyncio.gather(*(chat.ainvoke(question) for question in questions))

    ways: dict[str, Callable[[], Any]] = {
        "LLM.generate": lambda: llm.chat(
            [[{"role": "user", "content": question}] for question in questions], SamplingParams(**sampling),
            use_tqdm=False,
        ),
        "ainvoke": lambda: asyncio.run(gather()),
        "batch": lambda: chat.batch(questions),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                found[name].append(time.perf_counter() - began)
    return found


def profile(tokens: int) -> None:
    from langchain_octavo import ChatOctavo

    chat = ChatOctavo(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    list(chat.stream(QUESTION))
    profiler = cProfile.Profile()
    profiler.runcall(lambda: list(chat.stream(QUESTION)))
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.profile:
        return profile(given.tokens)
    with LLM() as llm:
        asynchronous = AsyncLLM()
        plain, more = streams(llm, asynchronous, given.tokens, given.rounds)
        asynchronous.close()
        print(f"{'us a token':<26}{'between tokens':>24}{'processor time':>24}")
        for name, (gap, cpu) in plain.items():
            print(f"{name:<26}{gap:>24.0f}{cpu:>24.0f}")
        for name, costs in more.items():
            print(f"more: {name:<20}" + "".join(f"{spread([cost[at] for cost in costs]):>24}" for at in (0, 1)))
        seconds = many(llm, given.requests, max(2, given.rounds // 4)) if find_spec("langchain_core") else {}
    for name, values in seconds.items():
        ratios = [value / least for value, least in zip(values, seconds["LLM.generate"], strict=True)]
        print(f"{given.requests} requests, {name:<14}{statistics.median(values):>8.2f} s, "
              f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})")  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps({"plain": plain, "more": more, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
