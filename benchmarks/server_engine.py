"""The engine in process, for `benchmarks/server.py`: a process with an `AsyncLLM` that answers the same loads as the
server beside it does. Reads a load of JSON in each line, prints its figures in one; first of all prints "ready". An
empty line asks what this machine allows at most, tokens a second by the number of streams.

    python benchmarks/server_engine.py '{"model": ..., settings of AsyncLLM}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from octavo import AsyncLLM, SamplingParams
from server_load import Figures, Load, Request, Stream


async def ask(llm: AsyncLLM, request: Request) -> Stream:
    """One request, its pieces taken as they come."""
    found = Stream()
    params = SamplingParams(**request.sampling)
    pieces = llm.chat_stream(request.messages, params) if request.chat else llm.stream(request.text, params)
    async for piece in pieces:
        found.tokens += len(piece.token_ids)
        if piece.text or piece.finish_reason:  # others are no event over HTTP either
            found.arrivals.append(time.perf_counter())
    return found


async def run(llm: AsyncLLM, load: Load) -> Figures:
    waiting = iter(range(load.requests))
    streams: list[Stream] = []

    async def one_after_the_other() -> None:
        for number in waiting:
            streams.append(await ask(llm, load.request(number)))

    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(load.streams)))
    seconds = time.perf_counter() - began
    return Figures.of(streams, seconds, time.process_time() - cpu)


def limits(llm: AsyncLLM) -> dict[str, float]:
    """Tokens a second that reading the weights and multiplying with them allow, by rows of a step."""
    from octavo.bench.machine import limit_of

    limit = limit_of(llm.engine)
    return {str(rows): limit.rate(rows) for rows in range(1, limit.at_once + 1)}


async def main() -> None:
    llm = AsyncLLM(**json.loads(sys.argv[1]))
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        answer = (await run(llm, Load(**json.loads(line)))).record() if line.strip() else limits(llm)
        print(json.dumps(answer), flush=True)
    await llm.aclose()


if __name__ == "__main__":
    asyncio.run(main())
