"""Does a server grow? 10,000 requests of all kinds against a tiny model, its memory after every 500 of them.

    python benchmarks/server_requests.py [--count 10000] [--at-once 16] [--out FILE]

Chats and completions, whole and streamed, with one output and two, under one of a few grammars; calls that are refused
(embeddings of a model that makes text, wrong bodies, unknown models, prompts that are too long); streams and whole
answers whose client leaves. Every status is checked. Memory is taken when nothing runs: resident, and what belongs to
the processes alone (USS) or in parts (PSS), of the server and its children together. What they made themselves, as
heaps, is anonymous; that alone does not move when another program maps the same libraries or ends. What the heaps have
obtained from the system, touched or not, is data: memory that is held for ever makes it grow. The slope is by
least squares over the samples after the first 2,000 requests, in kB for 1,000 requests, with its standard error. Ends
with 1 if any block of the KV cache is held afterwards, or anything still runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "runtime"), str(TESTS / "server")]
MODEL = "tiny"
OPTIONS = (
    "--served-model-name", MODEL, "--device", "cpu", "--num-blocks", "257", "--block-size", "16",
    "--max-num-seqs", "16",
)  # fmt: skip
EVERY, WARM_UP = 500, 2000
KINDS = ("anonymous", "data", "rss", "pss", "uss")
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
FORMS: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "[a-e]{3,12}(0|1|2)+"}},
    {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "ab", "schema": SCHEMA}}},
    {"response_format": {"type": "json_object"}},
]
WRONG: list[tuple[bytes, int]] = [
    (b"{", 400), (b"[]", 400), (b'{"messages": 3}', 400), (b'{"messages": [], "max_tokens": -1}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e9}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "model": "other"}', 404),
    (b'{"messages": [{"role": "user", "content": "' + b"a b c " * 9000 + b'"}]}', 400),
]  # fmt: skip


class Caller:
    """Makes requests, each by its number alone."""

    def __init__(self, client: httpx.AsyncClient, count: Counter[str]) -> None:
        self._client, self._count = client, count
        self._kinds: list[tuple[str, Callable[[random.Random], Awaitable[None]]]] = [
            ("chat whole", lambda source: self._whole(CHAT, self._chat(source))),
            ("chat streamed", lambda source: self._streamed(CHAT, self._chat(source))),
            ("completion whole", lambda source: self._whole(COMPLETIONS, self._completion(source))),
            ("completion streamed", lambda source: self._streamed(COMPLETIONS, self._completion(source))),
            ("two outputs whole", lambda source: self._whole(CHAT, self._chat(source) | {"n": 2})),
            ("two outputs streamed", lambda source: self._streamed(COMPLETIONS, self._completion(source) | {"n": 2})),
            ("grammar whole", lambda source: self._whole(CHAT, self._chat(source) | source.choice(FORMS))),
            ("grammar streamed", lambda source: self._streamed(CHAT, self._chat(source) | source.choice(FORMS))),
            ("no embeddings here", lambda _: self._refused(EMBEDDINGS, b'{"input": "a", "model": "tiny"}', 400)),
            ("wrong body", lambda source: self._refused(CHAT, *source.choice(WRONG))),
            ("stream left", self._left),
            ("answer left", self._cancelled),
        ]

    async def call(self, number: int) -> None:
        """Raises `AssertionError` with what came instead."""
        source = random.Random(number)
        name, kind = source.choice(self._kinds)
        try:
            await kind(source)
        except Exception as error:
            raise AssertionError(f"request {number}, {name}: {type(error).__name__}: {error}") from error
        self._count[name] += 1

    def _chat(self, source: random.Random) -> dict[str, Any]:
        words = " ".join(source.choice(("lamp", "stone", "river", "dog", "fox")) for _ in range(source.randint(1, 20)))
        return {"messages": [{"role": "user", "content": words}]} | self._sampling(source)

    def _completion(self, source: random.Random) -> dict[str, Any]:
        return {"prompt": [source.randrange(3, 300) for _ in range(source.randint(1, 90))]} | self._sampling(source)

    def _sampling(self, source: random.Random) -> dict[str, Any]:
        more = source.choice(
            [{}, {"logprobs": True}, {"stop": ["e", "a"]}, {"stream_options": {"include_usage": True}}]
        )
        found = {"model": MODEL, "max_tokens": source.randint(1, 40), "seed": source.randrange(2**31)}
        return found | {"temperature": source.choice([0.0, 0.7, 1.2])} | more

    async def _whole(self, path: str, body: dict[str, Any]) -> None:
        body.pop("stream_options", None)
        reply = await self._client.post(path, json=_fitted(path, body))
        assert reply.status_code == 200, f"{reply.status_code} {reply.text}"
        assert len(reply.json()["choices"]) == body.get("n", 1)

    async def _streamed(self, path: str, body: dict[str, Any]) -> None:
        async with self._client.stream("POST", path, json=_fitted(path, body) | {"stream": True}) as reply:
            text = (await reply.aread()).decode()
            assert reply.status_code == 200, f"{reply.status_code} {text}"
            assert text.endswith("data: [DONE]\n\n"), text[-500:]

    async def _refused(self, path: str, body: bytes, status: int) -> None:
        reply = await self._client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == status, f"{reply.status_code} instead of {status}: {reply.text[:500]}"
        assert reply.json()["error"]["message"]

    async def _left(self, source: random.Random) -> None:
        body = self._chat(source) | {"max_tokens": 200, "ignore_eos": True, "stream": True}
        body.pop("stop", None)
        async with self._client.stream("POST", CHAT, json=body) as reply:
            assert reply.status_code == 200
            lines = reply.aiter_lines()
            for _ in range(source.randint(0, 12)):
                await anext(lines)
            await lines.aclose()  # type: ignore[attr-defined]

    async def _cancelled(self, source: random.Random) -> None:
        body = self._completion(source) | {"max_tokens": 300, "ignore_eos": True}
        body.pop("stop", None)
        try:
            async with asyncio.timeout(source.random() * 0.2):
                await self._whole(COMPLETIONS, body)
        except TimeoutError:
            pass


def _fitted(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Completions have a number where chats have true."""
    return body | {"logprobs": 2} if path == COMPLETIONS and body.get("logprobs") else body


def memory(processes: list[psutil.Process]) -> dict[str, int]:
    """Bytes of all together."""
    full = [process.memory_full_info() for process in processes]
    found = {name: sum(getattr(one, name) for one in full) for name in KINDS[1:]}
    return {"anonymous": found["rss"] - sum(one.shared for one in full), **found}


def slope(points: list[tuple[int, int]]) -> tuple[float, float]:
    """Bytes for 1,000 requests by least squares, and its standard error."""
    middle = sum(x for x, _ in points) / len(points)
    height = sum(y for _, y in points) / len(points)
    spread = sum((x - middle) ** 2 for x, _ in points)
    rise = sum((x - middle) * (y - height) for x, y in points) / spread
    rest = sum((y - height - rise * (x - middle)) ** 2 for x, y in points)
    return rise * 1000, (rest / max(len(points) - 2, 1) / spread) ** 0.5 * 1000


async def some(url: str, numbers: range, at_once: int, count: Counter[str]) -> None:
    """These requests, so many at a time."""
    waiting = iter(numbers)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        caller = Caller(client, count)

        async def worker() -> None:
            for number in waiting:
                await caller.call(number)

        await asyncio.gather(*(worker() for _ in range(at_once)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--out", "--json", type=Path)
    given = parser.parse_args()

    from http_traces import Bench
    from serving_helpers import program
    from tiny_models import make_model

    count: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("llama-head-dim", Path(folder))
        with program("--model", str(model), *OPTIONS, threads=1) as running:
            asyncio.run(some(running.url, range(-100, 0), given.at_once, Counter()))
            parent = psutil.Process(running.process.pid)
            processes = [parent, *parent.children(recursive=True)]
            bench = Bench(running.url, MODEL, processes, vocabulary=300)
            before = bench.held()
            for first in range(0, given.count, EVERY):
                numbers = range(first, min(first + EVERY, given.count))
                asyncio.run(some(running.url, numbers, given.at_once, count))
                try:
                    held = bench.held()
                except AssertionError as problem:
                    print(f"after {numbers.stop} requests: {problem}")
                    return 1
                samples.append({"requests": numbers.stop, **asdict(held), **memory(processes)})
                passed = f"{time.monotonic() - began:.0f} s, load of the machine {os.getloadavg()[0]:.1f}"
                print(f"{passed}: {samples[-1]}", file=sys.stderr)
    after = {name: samples[-1][name] for name in asdict(before)}
    print(", ".join(f"{name} {number}" for name, number in sorted(count.items())))
    print(f"{given.count} requests in {time.monotonic() - began:.0f} s; before {asdict(before)}, afterwards {after}")
    print("no block of the KV cache is held")
    warm = [one for one in samples if one["requests"] >= WARM_UP]
    if len(warm) < 3:
        return 0
    slopes = {name: slope([(one["requests"], one[name]) for one in warm]) for name in KINDS}
    for name, (rise, error) in slopes.items():
        print(
            f"{name}: {samples[0][name] / 1e6:.1f} MB after {samples[0]['requests']}, {warm[0][name] / 1e6:.1f} after "
            f"{warm[0]['requests']}, {samples[-1][name] / 1e6:.1f} at the end; from then on {rise / 1e3:+.1f} kB "
            f"(standard error {error / 1e3:.1f}) for 1,000 requests"
        )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"kinds": count, "before": asdict(before), "samples": samples, "slopes": slopes}
        given.out.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
