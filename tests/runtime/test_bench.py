"""The rows of `octavo bench` and `benchmarks/gpu.py`, and their limits, against numbers worked out by hand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from octavo import LLM
from octavo.bench.limits import Machine, ModelWork, Part, least_seconds, share, step_need
from octavo.bench.machine import Limit, limit_of, model_work
from octavo.bench.run import Clock, beside, scale_for, time_row
from octavo.bench.sweep import levels, measure_level, percentiles, sweep
from octavo.bench.workloads import ROWS, Job, Mixed, OneStream, SharedPrefix, fitted
from octavo.models.config import parse_config
from octavo.models.config import read_json as config_of

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
INFINITE = float("inf")
# weights 1000 bytes, 400 + 100 parameters, 8 bytes of keys and values and 32 operations a pair in each of two layers
MODEL = ModelWork(1000, 400, 100, 8, 32, (0, 0))
WINDOWED = ModelWork(1000, 400, 100, 8, 32, (0, 4))


def job(prompts: list[int], counts: list[int], shared: int = 0) -> Job:
    return Job([[0] * length for length in prompts], counts, shared)


# -- limits ----------------------------------------------------------------------------------------------------------

STEPS = [
    # one token after 9: 10 keys in each layer
    (MODEL, [Part(9, 1)], 0, 1000 + 2 * 8 * 10, 2 * 400 + 2 * 100 + 2 * 32 * 10),
    # a prompt of 3: 1 + 2 + 3 pairs; the head is needed for its last token only
    (MODEL, [Part(0, 3)], 0, 1000 + 2 * 8 * 3, 3 * 2 * 400 + 2 * 100 + 2 * 32 * 6),
    # both at once: weights are read once
    (MODEL, [Part(9, 1), Part(0, 3)], 0, 1000 + 2 * 8 * 13, 4 * 2 * 400 + 2 * 2 * 100 + 2 * 32 * 16),
    # two sequences that share 8 tokens, and have two of their own
    (MODEL, [Part(9, 1), Part(9, 1)], 8, 1000 + 2 * 8 * (8 + 2 + 2), 2 * 1000 + 2 * 32 * 20),
    # the second layer sees 4 keys
    (WINDOWED, [Part(9, 1)], 0, 1000 + 8 * 10 + 8 * 4, 1000 + 32 * 10 + 32 * 4),
    # queries at 2..5 see 3, 4, 4, 4 keys there and 3, 4, 5, 6 in the first layer; all 6 are read
    (WINDOWED, [Part(2, 4)], 0, 1000 + 8 * 6 + 8 * 6, 4 * 800 + 200 + 32 * 18 + 32 * 15),
    # of keys 6..9 in the window 6 and 7 are shared
    (WINDOWED, [Part(9, 1), Part(9, 1)], 8, 1000 + 8 * 12 + 8 * 6, 2 * 1000 + 2 * 32 * 10 + 2 * 32 * 4),
]


@pytest.mark.parametrize(("model", "parts", "shared", "size", "operations"), STEPS)
def test_what_a_step_needs(model: ModelWork, parts: list[Part], shared: int, size: float, operations: float) -> None:
    need = step_need(model, parts, shared)
    assert (need.bytes, need.operations) == (size, operations)
    assert need.seconds(Machine(2.0, INFINITE)) == size / 2
    assert need.seconds(Machine(INFINITE, 4.0)) == operations / 4
    assert need.seconds(Machine(1.0, 1.0)) == max(size, operations)


@pytest.mark.parametrize("window", [1, 3, 5, 100])
@pytest.mark.parametrize("known", [0, 2, 7])
@pytest.mark.parametrize("new", [1, 3, 9])
def test_windows_count_as_a_mask_does(window: int, known: int, new: int) -> None:
    seen = {query: [key for key in range(query + 1) if query - key < window] for query in range(known, known + new)}
    need = step_need(ModelWork(0, 0, 0, 1, 1, (window,)), [Part(known, new)])
    assert need.bytes == len({key for keys in seen.values() for key in keys})
    assert need.operations == sum(map(len, seen.values()))


def test_a_job_is_the_sum_of_its_steps() -> None:
    reading = Machine(1.0, INFINITE)
    both = job([2, 2], [2, 1])
    # prompts of 2 and 2, then one token after 2
    assert least_seconds(MODEL, reading, both, 2) == (1000 + 16 * 4) + (1000 + 16 * 3)
    # one after the other: the second waits for the end of the first
    assert least_seconds(MODEL, reading, both, 1) == (1000 + 16 * 2) + (1000 + 16 * 3) + (1000 + 16 * 2)
    # a prompt joins a token: 1 + 2 keys and values, never again those of the first
    assert least_seconds(MODEL, reading, job([2, 2, 2], [2, 1, 1]), 2) == (1000 + 16 * 4) + (1000 + 16 * (3 + 2))


def test_a_prefix_is_computed_and_read_once() -> None:
    multiplying = Machine(INFINITE, 1.0)
    alone = least_seconds(MODEL, multiplying, job([10], [1]), 8)
    three = least_seconds(MODEL, multiplying, job([10, 10, 10], [1, 1, 1], 8), 8)
    # each of the others: tokens 8 and 9, which see 9 and 10 keys
    assert three == alone + 2 * (2 * 800 + 200 + 2 * 32 * 19)
    reading = Machine(1.0, INFINITE)
    assert least_seconds(MODEL, reading, job([10, 10], [2, 2], 8), 8) == (1000 + 16 * 12) + (1000 + 16 * 14)


def test_a_share_is_one_at_the_limit_and_less_above_it() -> None:
    assert share(50, 100, "tokens/s") == 0.5
    assert share(4.0, 1.0, "ms per token") == 0.25
    assert share(4.0, 1.0, "s") == 0.25


def test_what_an_8b_model_asks_for() -> None:
    config = parse_config(config_of(SHAPES / "llama3-8b" / "config.json"))
    table, layers = 128256 * 4096, 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336)
    work = model_work(config, 2 * (layers + 2 * table), 2)
    assert (work.layer_parameters, work.head_parameters) == (layers, table)
    assert work.weight_bytes == 2 * (layers + table), "of the embedding a step reads a line a token"
    assert (work.kv_bytes, work.pair_operations, work.windows) == (2 * 8 * 128 * 2, 4 * 32 * 128, (0,) * 32)
    small = parse_config(config_of(SHAPES / "qwen3-0.6b" / "config.json"))
    assert model_work(small, 1000, 2).weight_bytes == 1000, "its head is its embedding"


def test_the_limits_of_an_h100() -> None:
    """3.0 TB/s and 720 TFLOP/s: 15 GB of weights take 5.0 ms a token, in a batch a step feeds many rows."""
    config = parse_config(config_of(SHAPES / "llama3-8b" / "config.json"))
    limit = Limit(Machine(3.0e12, 720e12), model_work(config, 16_060_000_000, 2), 256)
    found = {name: row.value(limit.seconds, 100_000) for name, row in ROWS.items()}
    assert found["one_stream"] == pytest.approx(5.0, rel=0.01)
    operations = 2 * 6.98e9 * 8000 + 4 * 4096 * 32 * 8000**2 / 2
    assert found["first_8000"] == pytest.approx(1e3 * operations / 720e12, rel=0.01)
    assert 9_000 < found["batch"] < 11_000


# -- rows ------------------------------------------------------------------------------------------------------------

# Figures in README and LOG were measured with these prompts and counts: a change makes them another workload.
DIGESTS = {
    "one_stream": "b431b08f253b1a73", "first_128": "6ae9f32755883e30", "first_8000": "b2c1b23ccc46823a",
    "batch_64": "d5232091c75811a4", "prefix": "894ac055f996b82f", "batch": "569ba3c4aafe0b45",
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_full_rows_stay_what_they_were(name: str) -> None:
    jobs: list[tuple[list[list[int]], list[int]]] = []

    def seconds(job: Job) -> float:
        assert all(prompt[: job.shared] == job.prompts[0][: job.shared] for prompt in job.prompts)
        jobs.append((job.prompts, job.counts))
        return 1.0

    ROWS[name].value(seconds, 100_000)
    assert hashlib.sha256(json.dumps(jobs).encode()).hexdigest()[:16] == DIGESTS[name]


def test_figures_are_made_of_seconds() -> None:
    def seconds(job: Job) -> float:
        return 0.5 + 0.01 * sum(job.counts)

    assert ROWS["one_stream"].value(seconds, 100) == pytest.approx(10.0)
    assert ROWS["first_8000"].value(seconds, 100) == pytest.approx(510.0)
    assert ROWS["batch_64"].value(seconds, 100) == pytest.approx(64 * 128 / (0.5 + 0.01 * 64 * 128))
    assert ROWS["prefix"].value(seconds, 100) == pytest.approx(0.5 + 0.01 * 128 * 64)


def test_a_row_says_what_was_run() -> None:
    half = ROWS["batch"].resized(0.5, 0.25)
    assert half == Mixed(128, 25, 256)
    assert half.label == "128 requests, 25 to 256 in and out"
    assert OneStream().resized(0.1, 0.01) == OneStream(8, 9), "lengths stop at 8"


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("most", [120, 512, 2048, 8192])
def test_rows_are_shortened_to_what_an_engine_holds(name: str, most: int) -> None:
    row = fitted(ROWS[name], most)
    assert row.longest <= most
    assert (row == ROWS[name]) == (ROWS[name].longest <= most)
    if row != ROWS[name]:
        assert row.longest > 0.8 * most, "no shorter than need be"


def test_what_cannot_be_shortened_enough_is_refused() -> None:
    with pytest.raises(ValueError, match="prefix needs at least 24 tokens, the engine holds 20"):
        fitted(SharedPrefix(), 20)


def test_a_row_is_scaled_to_the_time_it_is_expected_to_take() -> None:
    def expected(job: Job) -> float:
        return sum(job.counts) / 1000

    row = Mixed()
    assert scale_for(row, expected, 1000.0, 50_000, 8192) == 1.0
    part = scale_for(row, expected, 20.0, 50_000, 8192)
    smaller, larger = row.resized(part, part), row.resized(2 * part, 2 * part)
    made = [0, 0]
    for place, one in enumerate((smaller, larger)):
        one.value(lambda job, place=place: made.__setitem__(place, sum(job.counts)) or 1.0, 50_000)  # type: ignore[func-returns-value, misc]
    assert made[0] <= 20_000 < made[1]
    assert scale_for(row, expected, 0.0, 50_000, 8192) == 1 / 64, "the smallest, when nothing fits"


def test_percentiles_lie_between_values() -> None:
    found = percentiles([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.p50, found.p90, found.p99) == pytest.approx((3.0, 4.6, 4.96))
    assert percentiles([7.0]) == type(found)(7.0, 7.0, 7.0)


def test_levels_end_with_all_that_run_at_once() -> None:
    assert levels(1) == [1]
    assert levels(64) == [1, 2, 4, 8, 16, 32, 64]
    assert levels(48) == [1, 2, 4, 8, 16, 32, 48]


# -- on an engine ----------------------------------------------------------------------------------------------------


def test_rows_run_on_an_engine_and_no_figure_is_above_its_limit(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32") as llm:
        limit, clock = limit_of(llm.engine), Clock(llm)
        config = llm.engine.model_config
        assert limit.model.kv_bytes == 2 * config.num_kv_heads * config.head_dim * 4, "the cache holds float32"
        assert limit.at_once == 64
        clock.warm_up()
        assert clock.slowness(limit) > 1
        for name, row in ROWS.items():
            result = beside(limit, time_row(clock, row, scale=1 / 32), clock.vocabulary)
            assert (result.name, result.scale, result.shortened) == (name, 1 / 32, False)
            assert result.value > 0
            assert 0 < (result.share or 0) < 1
        result = beside(limit, time_row(clock, ROWS["first_8000"]), clock.vocabulary)
        assert result.shortened
        assert result.label == f"first token of {llm.engine.limits.max_model_len - 1}"


def test_the_script_for_gpus_prints_figures_limits_and_shares(tiny_model: Path, tmp_path: Path) -> None:
    """On this CPU, with a shape small enough; in its processes, as it runs there. Nothing that draws is imported."""
    shape, out = tmp_path / "shape", tmp_path / "out.json"
    shape.mkdir()
    (shape / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    for name in ("matplotlib", "rich", "typer"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(SHAPES.parent / "gpu.py"), "--shapes", str(shape), "--rows", "ready", "first_128",
         "--rounds", "2", "--settings", '{"device": "cpu", "dtype": "float32"}', "--out", str(out)],
        capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (runs,) = json.loads(out.read_text()).values()
    for run in runs:
        assert set(run) == {"ready", "first_128", "limits"}
        assert 0 < run["limits"]["first_128"] < run["first_128"]
    figure = r" +[\d.]+ \([\d.]+\.\.[\d.]+\)"
    assert re.search(rf"^first token of 128, ms{figure} of [\d.e-]+: \d+%$", done.stdout, flags=re.M)
    assert re.search(rf"^ready, s{figure}$", done.stdout, flags=re.M)


def test_a_level_keeps_so_many_requests_under_way(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32", max_num_seqs=6) as llm:
        most = []
        plan = llm.engine.service.call(lambda core: core.scheduler.plan)

        def counted() -> object:
            draft = plan()
            if draft is not None:
                most.append(len(draft.parts))
            return draft

        llm.engine.service.call(lambda core: setattr(core.scheduler, "plan", counted))
        level = measure_level(llm, 3, 7, 20, 5)
        assert max(most) == 3
        assert len(level.job.prompts) == 7
        assert level.job.counts == [5] * 7
        for found in (level.time_to_first_token, level.inter_token_latency):
            assert 0 < found.p50 <= found.p90 <= found.p99 < level.seconds
        assert [one.concurrency for one in sweep(llm, seconds=60)] == [1, 2, 4, 6]
        assert [one.concurrency for one in sweep(llm, seconds=0.0)] == [1], "the first is always measured"
        shown = level.beside(limit_of(llm.engine))
        assert shown.tokens_per_second == pytest.approx(35 / level.seconds)
        assert shown.tokens_per_second < shown.limit
