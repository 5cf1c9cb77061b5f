"""The scheduler under any trace of requests, aborts and failures, against the simulated device (`sim_device.py`)."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from octavo import SamplingParams
from octavo.engine.blocks import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.request import Request, TokenEvent
from octavo.engine.scheduler import Scheduler
from octavo.errors import RequestFailedError
from sim_device import EOS, POISON, SimDevice, expected_search, expected_tokens

SIZE = 4


class World:
    """A core on a simulated device, and everything its requests were sent."""

    def __init__(
        self, *, blocks: int, rows: int, budget: int, depth: int, caching: bool = True, size: int = SIZE
    ) -> None:
        pool = BlockPool(blocks, size, caching=caching)
        clock = itertools.count()
        self.scheduler = Scheduler(
            pool, max_num_seqs=rows, max_num_batched_tokens=max(budget, rows), clock=lambda: next(clock)
        )
        self.rows = rows
        self.device = SimDevice(self.scheduler, stale_matters=depth == 0)
        self.core = EngineCore(self.scheduler, self.device, depth=depth)
        self.requests: list[Request] = []
        self.events: dict[tuple[str, int], list[TokenEvent]] = {}

    def add(self, prompt: list[int], **options: object) -> Request:
        search = options.get("search") or {}
        params = SamplingParams(
            n=options.get("n", 1), min_tokens=0 if search else options.get("min_tokens", 0),
            ignore_eos=options.get("ignore_eos", False), max_tokens=None, use_beam_search=bool(search), **search,
        )  # fmt: skip
        number = len(self.requests)
        room = self.scheduler.pool.capacity * SIZE
        prompt = prompt[: room - 1]
        wanted = min(options.get("max_tokens", 5), room - len(prompt))
        request = Request(
            f"r{number}", prompt, params, lambda event: self._take(request, event), max_tokens=wanted,
            eos_token_ids=[EOS], seed=number, priority=options.get("priority", 0), cache_salt=options.get("salt", ""),
        )  # fmt: skip
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def _take(self, request: Request, event: TokenEvent) -> None:
        self.events.setdefault((request.request_id, event.index), []).append(event)

    def check(self) -> None:
        """What must be true between two steps."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        assert len(pool._free) + pool.cached + pool.used == pool.capacity
        holders = Counter(block for sequence in scheduler.running for block in sequence.blocks)
        assert {block: count for block, count in enumerate(pool._holders) if count} == dict(holders)
        assert 0 not in holders
        rows = [sequence.row for sequence in scheduler.running]
        assert sorted(rows + scheduler.free_rows) == list(range(self.rows)), "a row is lost or owned twice"
        assert scheduler.running == sorted(scheduler.running, key=lambda s: s.order)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda s: s.order)
        for sequence in scheduler.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            assert len(sequence.blocks) * pool.block_size >= sequence.scheduled
            assert len(sequence.block_keys) <= len(sequence.blocks)
        for sequence in scheduler.waiting:
            assert not sequence.blocks
            assert sequence.row == -1
        known = scheduler.running + scheduler.waiting
        alive = [s for request in self.requests for s in request.sequences if not s.finished]
        assert sorted(map(id, known)) == sorted(map(id, alive)), "a sequence is lost, or kept after its end"
        fresh = [r for r in self.requests if r.metrics.queue_time is None and not all(s.finished for s in r.sequences)]
        assert scheduler.fresh == len(fresh)

    def step(self) -> None:
        self.core.step()
        self.check()

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if self.core.idle:
                break
            self.step()
        assert self.core.idle, "the engine does not come to an end"
        pool = self.scheduler.pool
        assert pool.used == 0
        assert not self.scheduler.running + self.scheduler.waiting + self.scheduler.suspects
        assert self.scheduler.fresh == 0

    def outcome(self, request: Request, index: int = 0) -> tuple[list[int], str | None, BaseException | None]:
        events = self.events.get((request.request_id, index), [])
        assert [event.last for event in events] == [False] * (len(events) - 1) + [True], "no end, or more after the end"
        tokens = [token for event in events for token in event.token_ids]
        return tokens, events[-1].finish_reason, events[-1].error

    def expected(self, request: Request, index: int) -> tuple[list[int], str]:
        if request.beams:
            return expected_search(request)[index]
        return expected_tokens(request, self.seed(request, index))

    def seed(self, request: Request, index: int) -> int:
        return self.scheduler.new_row(request.sequences[index]).seed


PROMPT = st.one_of(
    st.lists(st.integers(10, 12), min_size=1, max_size=30),
    st.integers(1, 30).map(lambda length: [10 + i % 3 for i in range(length)]),  # shared prefixes of any length
)
SEARCH = st.fixed_dictionaries(
    {
        "beam_width": st.sampled_from([4, 5, 6]), "early_stopping": st.sampled_from([False, True, "never"]),
        "length_penalty": st.sampled_from([0.0, 1.0, 2.0, -1.0]),
    }
)  # fmt: skip
ADD = st.fixed_dictionaries(
    {
        "prompt": PROMPT, "max_tokens": st.integers(1, 20), "n": st.sampled_from([1, 1, 1, 2, 4]),
        "priority": st.sampled_from([0, 0, 0, -1, 3]), "salt": st.sampled_from(["", "", "", "s"]),
        "min_tokens": st.sampled_from([0, 0, 3]), "ignore_eos": st.booleans(),
        "poison": st.sampled_from([None, None, None, None, None, 0, 3, 11]),
        "search": st.one_of(st.none(), st.none(), SEARCH),
    }
)  # fmt: skip
OPERATION = st.one_of(
    st.tuples(st.just("add"), ADD),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 50)),
    st.tuples(st.just("abort one"), st.integers(0, 50)),
    st.tuples(st.sampled_from(["fail launch", "fail wait"]), st.just(0)),
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    blocks=st.integers(3, 14), rows=st.integers(1, 6), budget=st.integers(1, 40), depth=st.integers(0, 2),
    caching=st.booleans(), trace=st.lists(OPERATION, min_size=1, max_size=25),
)  # fmt: skip
@example(  # a fork of a sequence whose prompt is still under way, in a step that fails late
    blocks=3, rows=2, budget=1, depth=1, caching=False,
    trace=[("add", {"prompt": [10, 11], "max_tokens": 1, "n": 2, "poison": None, "search": None}), ("fail wait", 0)],
)  # fmt: skip
def test_any_trace_keeps_the_books_and_gives_the_right_tokens(
    blocks: int, rows: int, budget: int, depth: int, caching: bool, trace: list[tuple[str, object]]
) -> None:
    world = World(blocks=blocks, rows=rows, budget=budget, depth=depth, caching=caching)
    aborted: set[str] = set()
    faults = 0
    for kind, value in trace:
        if kind == "add":
            options = dict(value)  # type: ignore[call-overload]
            prompt, place = list(options.pop("prompt")), options.pop("poison")
            if place is not None:
                prompt.insert(min(place, len(prompt)), POISON)
            world.add(prompt, **options)
        elif kind == "step":
            for _ in range(value):  # type: ignore[call-overload]
                world.step()
        elif kind.startswith("abort") and world.requests:
            request = world.requests[value % len(world.requests)]  # type: ignore[operator]
            aborted.add(request.request_id)
            world.scheduler.abort(request, value % 3 if kind == "abort one" else None)  # type: ignore[operator]
            world.check()
        elif kind.startswith("fail"):
            world.device.fail_launch, world.device.fail_wait = kind == "fail launch", kind == "fail wait"
            faults += 1
    world.run()
    failed = set[tuple[str, int]]()
    for request in world.requests:
        for index in range(request.params.choices):
            tokens, reason, error = world.outcome(request, index)
            if POISON in request.prompt_ids:
                assert tokens == []
                assert (error is not None) or (reason == "abort" and request.request_id in aborted)
                continue
            expected, expected_reason = world.expected(request, index)
            if error is not None:  # a fault of the device hit this one alone (or a search, of which all ends)
                failed.add((request.request_id, 0 if request.beams else index))
                assert isinstance(error, RequestFailedError)
            elif reason == "abort":
                assert request.request_id in aborted
            else:
                assert (tokens, reason) == (expected, expected_reason)
            assert tokens == expected[: len(tokens)]
    assert len(failed) <= faults, "a request failed with its neighbour"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_request_that_raises_fails_alone(depth: int) -> None:
    """Every step which computes token 88 raises. Of 12 requests in one batch exactly the guilty two fail."""
    world = World(blocks=40, rows=12, budget=64, depth=depth)
    world.device.raise_on = 88
    requests = [world.add([10, 11 + i, 12, *([88] if i in (3, 8) else [])], max_tokens=9) for i in range(12)]
    world.run()
    for number, request in enumerate(requests):
        tokens, reason, error = world.outcome(request)
        if number in (3, 8):
            assert isinstance(error, RequestFailedError)
            assert isinstance(error.__cause__, RuntimeError)
            assert "the device failed" in str(error)
            assert tokens == []
        else:
            assert (tokens, reason) == expected_tokens(request, world.seed(request, 0))


@pytest.mark.parametrize("depth", [0, 1])
def test_the_beam_that_raises_ends_its_search_alone(depth: int) -> None:
    """A step that computes a token which only beams of the search make raises: all of it fails, and nobody else."""
    world = World(blocks=60, rows=12, budget=64, depth=depth)
    others = [world.add([10, 11 + i], max_tokens=9) for i in range(6)]
    guilty = world.add([12, 12, 10], max_tokens=9, n=2, search={"beam_width": 4})
    expected = [world.expected(request, 0) for request in others]
    innocent = {EOS, *(token for tokens, _ in expected for token in tokens)}
    world.device.raise_on = next(token for token in world.expected(guilty, 0)[0][1:-1] if token not in innocent)
    world.run()
    assert [isinstance(world.outcome(guilty, index)[2], RequestFailedError) for index in (0, 1)] == [True, True]
    assert [world.outcome(request)[:2] for request in others] == expected


def test_several_broken_beams_leave_nothing_behind() -> None:
    """Beams of one search take a poisoned token, often several in one step. What they wrote reaches nobody: on this
    device a stale NaN in a reused block is found out."""
    world = World(blocks=14, rows=8, budget=32, depth=0)
    failed = 0
    for number in range(120):
        world.device.poisons = {20, 21, 22, 23}
        guilty = world.add([10, 11 + number % 5, number % 7], max_tokens=14, search={"beam_width": 6})
        world.run()
        failed += world.outcome(guilty)[2] is not None
        world.device.poisons = {POISON}
        other = world.add([12] * 20 + [number % 9], max_tokens=20, ignore_eos=True)
        world.run()
        assert world.outcome(other)[:2] == world.expected(other, 0)
    assert failed > 50


def test_a_long_random_run_preempts_and_loses_nothing() -> None:
    """2000 requests through 10 blocks: the pool is always short, and every output is right."""
    rng = random.Random(5)
    world = World(blocks=11, rows=8, budget=16, depth=1)
    for _ in range(2000):
        prompt = [10 + i % 3 for i in range(rng.randint(1, 20))] + [rng.randint(10, 12)]
        world.add(prompt, max_tokens=rng.randint(1, 15), n=rng.choice([1, 1, 2]), priority=rng.choice([0, 1]))
        for _ in range(rng.randint(0, 6)):
            world.core.step()
    world.check()
    world.run(100_000)
    for request in world.requests:
        for index in range(len(request.sequences)):
            tokens, reason, _ = world.outcome(request, index)
            assert (tokens, reason) == expected_tokens(request, world.seed(request, index))
    assert world.scheduler.preemptions > 100
    assert world.device.copied > 100, "no fork copied a block"


@pytest.mark.parametrize(("blocks", "rows"), [(12, 8), (60, 4), (9, 3)])
def test_searches_where_rows_or_blocks_are_short(blocks: int, rows: int) -> None:
    """Beams which do not fit at once run one after the other, among other requests, and find the same."""
    rng = random.Random(blocks)
    world = World(blocks=blocks, rows=rows, budget=16, depth=1)
    for _ in range(300):
        prompt = [10 + i % 3 for i in range(rng.randint(1, 20))] + [rng.randint(10, 12)]
        search = {"beam_width": rng.choice([2, 4, 6])} if rng.random() < 0.6 else None
        world.add(prompt, max_tokens=rng.randint(1, 12), n=rng.choice([1, 2]), search=search)
        for _ in range(rng.randint(0, 6)):
            world.step()
    world.run(100_000)
    for request in world.requests:
        for index in range(request.params.choices):
            tokens, reason, error = world.outcome(request, index)
            assert error is None
            assert (tokens, reason) == world.expected(request, index)
    assert world.scheduler.preemptions > 100
    assert world.device.copied > 100, "no fork copied a block"


def test_the_beams_of_a_search_share_what_they_have_in_common() -> None:
    """A prompt of 512 tokens, 64 new ones, in blocks of 16: 4 beams need less than 1.35 times the blocks of one."""
    used = {}
    for width in (1, 4):
        search = {"beam_width": 4} if width == 4 else None
        world = World(blocks=200, rows=8, budget=600, depth=0, size=16)
        world.add([10 + i % 7 for i in range(512)], max_tokens=65, ignore_eos=True, search=search)
        while world.scheduler.running == [] or world.scheduler.running[0].num_output < 64:
            world.step()
        used[width] = world.scheduler.pool.used
    assert used[1] == 36
    assert used[4] < 1.35 * used[1]


def test_priority_then_arrival_decides_who_starts() -> None:
    world = World(blocks=30, rows=1, budget=64, depth=0)
    first = world.add([10], max_tokens=2, ignore_eos=True)
    world.step()
    low, high, same = (world.add([10 + i], max_tokens=2, ignore_eos=True, priority=p) for i, p in enumerate([5, -5, 5]))
    world.run()
    started = sorted([first, low, high, same], key=lambda request: request.metrics.queue_time + request.metrics.arrival)
    assert started == [first, high, low, same]


def test_the_last_in_order_is_preempted() -> None:
    world = World(blocks=5, rows=3, budget=64, depth=0)
    important = world.add([10, 11, 12], max_tokens=13, ignore_eos=True, priority=1)
    world.step()
    other = world.add([11, 11, 12], max_tokens=13, ignore_eos=True, priority=2)
    world.run()
    assert important.metrics.preemptions == 0
    assert other.metrics.preemptions > 0


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_ones() -> None:
    world = World(blocks=40, rows=4, budget=8, depth=0)
    short = world.add([10], max_tokens=20, ignore_eos=True)
    world.step()
    world.add([11] * 60, max_tokens=2, ignore_eos=True)
    for _ in range(8):
        before = short.sequences[0].num_output
        world.step()
        assert short.sequences[0].num_output == before + 1, "a long prompt made a decoding request wait"
    world.run()


def test_a_common_prefix_is_computed_once() -> None:
    world = World(blocks=40, rows=4, budget=64, depth=0)
    prefix = [10, 11, 12, 13] * 4
    world.add([*prefix, 20], max_tokens=1)
    world.run()
    request, salted = world.add([*prefix, 21], max_tokens=1), world.add([*prefix, 21], max_tokens=1, salt="x")
    world.run()
    assert request.metrics.cached_tokens == len(prefix)
    assert salted.metrics.cached_tokens == 0
    whole = world.add(prefix, max_tokens=1)
    world.run()
    assert whole.metrics.cached_tokens == len(prefix) - SIZE, "the last token must be computed: its logits are needed"


@pytest.mark.parametrize("budget", [6, 64])
@pytest.mark.parametrize("depth", [0, 1])
def test_of_requests_that_come_at_once_one_computes_the_common_prefix(depth: int, budget: int) -> None:
    world = World(blocks=60, rows=6, budget=budget, depth=depth)
    prefix = [10, 11, 12, 13] * 5
    alike = [world.add([*prefix, 20 + n], max_tokens=6, ignore_eos=True) for n in range(4)]
    other = world.add([40, 41, 42], max_tokens=2, ignore_eos=True)
    salted = world.add([*prefix, 25], max_tokens=6, salt="x", ignore_eos=True)
    world.run()
    assert [request.metrics.cached_tokens for request in alike] == [0, *[len(prefix)] * 3]
    assert salted.metrics.cached_tokens == 0
    assert other.metrics.last_token_time < alike[-1].metrics.first_token_time, "it waited for a prefix not its own"
    for request in (*alike, other, salted):
        assert world.outcome(request) == (*expected_tokens(request, world.seed(request, 0)), None)


def test_nobody_waits_for_the_prefix_of_somebody_of_less_priority() -> None:
    world = World(blocks=60, rows=6, budget=8, depth=0)
    prefix = [10, 11, 12, 13] * 5
    world.add([*prefix, 20], priority=5)
    world.step()  # a part of the prefix is there, the next block is coming
    (urgent,), (patient,) = (world.add([*prefix, 21], priority=priority).sequences for priority in (0, 9))
    assert not world.scheduler._coming.would_help(urgent)
    assert world.scheduler._coming.would_help(patient)
    world.run()
    for request in world.requests:
        assert world.outcome(request) == (*expected_tokens(request, world.seed(request, 0)), None)


def test_sequences_with_a_common_beginning_are_told_so_to_the_device() -> None:
    world = World(blocks=60, rows=6, budget=64, depth=0)
    prefix = [10, 11, 12, 13] * 5
    for n in range(4):
        world.add([*prefix, 20 + n], max_tokens=6, ignore_eos=True)
    world.run()
    assert world.device.shared_most == 5 * 3


@pytest.mark.parametrize("how", ["abort", "fail"])
@pytest.mark.parametrize("depth", [0, 1])
def test_who_waits_for_a_prefix_computes_it_where_it_does_not_come(depth: int, how: str) -> None:
    world = World(blocks=60, rows=6, budget=6, depth=depth)
    prefix = [10, 11, 12, 13] * 5
    first = world.add([*prefix, 88], max_tokens=2, ignore_eos=True)
    others = [world.add([*prefix, 20 + n], max_tokens=2, ignore_eos=True) for n in range(2)]
    world.step()
    if how == "abort":
        world.scheduler.abort(first)
    else:
        world.device.raise_on = 88
    world.run()
    assert world.outcome(first)[1] == "abort" if how == "abort" else world.outcome(first)[2] is not None
    for request in others:
        assert world.outcome(request) == (*expected_tokens(request, world.seed(request, 0)), None)


def test_outputs_of_one_prompt_share_its_blocks() -> None:
    world = World(blocks=60, rows=8, budget=64, depth=0)
    request = world.add([10] * 18, max_tokens=3, n=4, ignore_eos=True)
    world.step()
    world.step()
    assert len(world.scheduler.running) == 4
    # 4 full blocks of the prompt once, and for each output its own copy of the half-full fifth
    assert world.scheduler.pool.used == 4 + 4
    world.run()
    assert len({tuple(world.outcome(request, index)[0]) for index in range(4)}) > 1


def test_a_sink_that_raises_ends_its_own_request_only() -> None:
    world = World(blocks=30, rows=4, budget=64, depth=1)
    bad = world.add([10, 11], max_tokens=10, n=2, ignore_eos=True)
    good = world.add([10, 12], max_tokens=10, ignore_eos=True)

    def broken(event: TokenEvent) -> None:
        raise RuntimeError("the event loop is closed")

    bad.sink = broken
    world.run()
    assert all(sequence.finished for sequence in bad.sequences)
    assert world.outcome(good)[:2] == expected_tokens(good, world.seed(good, 0))


def test_this_half_of_the_engine_knows_no_torch() -> None:
    modules = ["blocks", "core", "plan", "request", "scheduler", "service"]
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module("octavo.engine." + name)
found = [name for name in ("torch", "transformers", "triton", "numpy") if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
