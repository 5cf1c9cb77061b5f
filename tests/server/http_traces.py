"""Random timed traces over HTTP: requests that share prefixes, with several outputs, beams and grammars, streamed or
whole, some of them left in the middle. Whatever is answered whole must be what the same request gives alone; afterwards
nothing is held. Used by `test_http_traces.py` (some seeds) and by `benchmarks/server_traces.py` (any number).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

CASES = 60
SETTLE_SECONDS = 20.0


@dataclass
class Totals:
    traces: int = 0
    requests: int = 0
    left: int = 0
    compared: int = 0
    kinds: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Held:
    """What a server holds while nothing runs."""

    descriptors: int
    threads: int
    tasks: int


class Bench:
    """A running server, a catalogue of requests, and what each gives alone. `vocabulary`: prompts are of token ids
    below it. The server must be started with `--deterministic`, or a batch may round otherwise than a request alone."""

    def __init__(self, url: str, model: str, processes: list[psutil.Process], vocabulary: int, seed: int = 0) -> None:
        self.url, self.model, self.processes, self.vocabulary = url, model, processes, vocabulary
        self.cases = self._catalogue(random.Random(seed))
        self._alone: dict[int, Any] = {}

    def _catalogue(self, rng: random.Random) -> list[dict[str, Any]]:
        def ids(count: int) -> list[int]:
            return [rng.randrange(3, self.vocabulary) for _ in range(count)]

        roots = [ids(length) for length in (20, 33, 64, 90)]
        cases = []
        for number in range(CASES):
            root = rng.choice(roots)
            n = rng.choice([1, 1, 1, 2, 3])
            case: dict[str, Any] = {
                "model": self.model, "prompt": root[: rng.randint(1, len(root))] + ids(rng.choice([0, 1, 5, 20])),
                "max_tokens": rng.choice([1, 4, 16, 24, 40]), "n": n, "seed": rng.randrange(2**40),
                "temperature": rng.choice([0.0, 0.3, 1.0, 1.5]), "ignore_eos": rng.random() < 0.5,
                "return_token_ids": True,
            }  # fmt: skip
            case |= [
                {"logprobs": 2}, {"top_k": 20}, {"top_p": 0.8}, {"repetition_penalty": 1.3}, {},
                {"cache_salt": "other"},
                {"structured_outputs": {"regex": "[a-e]{3,20}(0|1|2)+"}, "ignore_eos": False},
                {"use_beam_search": True, "n": 2, "best_of": 2, "temperature": 0.0},
                {"stop": ["e", "a"]}, {"priority": 2},
            ][number % 10]  # fmt: skip
            cases.append(case)
        return cases

    async def _answer(self, client: httpx.AsyncClient, number: int) -> Any:
        """What a caller sees of the answer, but for ids and times."""
        reply = await client.post("/v1/completions", json=self.cases[number])
        assert reply.status_code == 200, f"{reply.status_code} {reply.text}"
        found = reply.json()
        return [
            (one["index"], one["text"], one["finish_reason"], one["token_ids"], json.dumps(one["logprobs"]))
            for one in found["choices"]
        ]

    async def _streamed(self, client: httpx.AsyncClient, number: int, leave_after: int | None) -> Any:
        """The same, put together of a stream; None if it was left before its end."""
        texts: dict[int, list[str]] = {}
        tokens: dict[int, list[int]] = {}
        reasons: dict[int, str] = {}
        chunks = 0
        async with client.stream("POST", "/v1/completions", json=self.cases[number] | {"stream": True}) as reply:
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                if leave_after is not None and chunks >= leave_after:
                    return None
                if not line.startswith("data: {"):
                    continue
                chunks += 1
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    texts.setdefault(choice["index"], []).append(choice["text"])
                    tokens.setdefault(choice["index"], []).extend(choice.get("token_ids") or ())
                    if choice["finish_reason"] is not None:
                        assert choice["index"] not in reasons, "it ended twice"
                        reasons[choice["index"]] = choice["finish_reason"]
        return [(index, "".join(texts[index]), reasons.get(index), tokens[index]) for index in sorted(texts)]

    async def trace(self, seed: int, totals: Totals) -> None:
        """One trace; raises AssertionError with the seed when anything is wrong."""
        rng = random.Random(seed)
        numbers = [rng.randrange(CASES) for _ in range(rng.randint(3, 12))]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            for number in set(numbers) - set(self._alone):
                self._alone[number] = await self._answer(client, number)
            plans = [(number, rng.random() * 0.3, rng.choice(["whole", "stream", "leave", "cancel"]), rng.randint(0, 6),
                      rng.random() * 0.2) for number in numbers]  # fmt: skip
            await asyncio.gather(*(self._one(client, plan, f"trace {seed}", totals) for plan in plans))
        totals.traces += 1
        totals.requests += len(numbers)

    async def _one(
        self, client: httpx.AsyncClient, plan: tuple[int, float, str, int, float], what: str, totals: Totals
    ) -> None:
        number, pause, kind, chunks, patience = plan
        await asyncio.sleep(pause)
        place = f"{what}, {kind} of {self.cases[number]}"
        searches = self.cases[number].get("use_beam_search", False)
        totals.kinds.add(kind)
        if kind == "cancel":
            try:
                async with asyncio.timeout(patience):
                    await self._answer(client, number)
            except TimeoutError:
                totals.left += 1
            return
        if kind == "whole" or (kind == "stream" and searches):
            found, wanted = await self._answer(client, number), self._alone[number]
        else:
            found = await self._streamed(client, number, chunks if kind == "leave" else None)
            wanted = [choice[:4] for choice in self._alone[number]]
            if found is None:
                totals.left += 1
                return
        totals.compared += 1
        assert found == wanted, place

    def held(self) -> Held:
        """Once nothing runs. Raises AssertionError if blocks are still held, or anything runs, after a while."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            page = httpx.get(f"{self.url}/metrics").text
            values = {
                (sample.name, sample.labels.get("state")): sample.value
                for family in text_string_to_metric_families(page)
                for sample in family.samples
            }
            busy = {
                name: values[name, state]
                for name, state in (("vllm:num_requests_running", None), ("vllm:num_requests_waiting", None),
                                    ("octavo:kv_blocks", "used"))
            }  # fmt: skip
            if not any(busy.values()):
                break
            assert time.monotonic() < deadline, f"still held: {busy}"
            time.sleep(0.05)
        return Held(
            sum(process.num_fds() for process in self.processes),
            sum(process.num_threads() for process in self.processes), int(values.get(("octavo:tasks", None), 0)),
        )  # fmt: skip
