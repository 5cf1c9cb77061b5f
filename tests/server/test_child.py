"""An engine in a child process gives what one in this process gives, and goes on where its process is replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from child_helpers import child, essence, here, killing, pid_of, requests, service_of, wait_for_spare
from octavo import SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.config import engine_config_from
from octavo.engine.child import service
from octavo.engine.child.placement import InChild
from octavo.engine.child.processes import SPARES
from octavo.errors import EngineClosedError, ModelFileError, QueueFullError, RequestError
from octavo.models.sources import DEFAULT_MODEL, EMBEDDING_MODEL
from octavo.processes.channel import spawn
from octavo.structured_outputs import StructuredOutputsParams

LONG = SamplingParams(max_tokens=300, ignore_eos=True, seed=5)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture(scope="module")
def expected(model: Path) -> list[object]:
    with here(model) as llm:
        prompts, params = zip(*requests(36), strict=True)
        outputs = asyncio.run(llm.generate(list(prompts), list(params)))
    return [essence(output) for output in outputs]


@pytest.fixture
def llm(model: Path) -> Iterator[AsyncLLM]:
    with child(model) as found:
        yield found


async def test_all_kinds_of_requests_as_in_process(llm: AsyncLLM, expected: list[object]) -> None:
    prompts, params = zip(*requests(36), strict=True)
    outputs = await llm.generate(list(prompts), list(params))
    assert [essence(output) for output in outputs] == expected
    metrics = outputs[0].metrics
    assert metrics.output_tokens == 120
    assert 0 <= (metrics.queue_time or -1) <= (metrics.first_token_time or -1) <= (metrics.last_token_time or -1)
    stats = await asyncio.to_thread(llm.stats)
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.largest_batch > 10


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_all_kinds_go_on_where_the_process_is_replaced(
    llm: AsyncLLM, expected: list[object], how: signal.Signals
) -> None:
    prompts, params = zip(*requests(36), strict=True)
    await wait_for_spare()
    async with killing(llm, [how, signal.SIGKILL], 0.4):
        outputs = await llm.generate(list(prompts), list(params))
    assert [essence(output) for output in outputs] == expected
    assert service_of(llm).restarts >= 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_stream_of_the_default_model_goes_on_within_five_seconds(how: signal.Signals) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=1, temperature=0.0)
    with child(Path(DEFAULT_MODEL), dtype="auto", deterministic=False) as llm:
        alone = (await llm.generate(["Once upon a time"], params))[0].outputs[0]
        await wait_for_spare()
        tokens: list[int] = []
        text, last, longest, killed = "", time.monotonic(), 0.0, False
        async for piece in llm.stream("Once upon a time", params):
            now = time.monotonic()
            tokens, text, last, longest = [*tokens, *piece.token_ids], text + piece.text, now, max(longest, now - last)
            if len(tokens) >= 20 and not killed:
                killed = True
                os.kill(pid_of(llm), how)
        assert (tokens, text) == (alone.token_ids, alone.text)
        assert service_of(llm).restarts == 1
    print(f"{how.name}: {longest:.2f} s without a token")
    assert longest < 5


async def test_embeddings_go_on() -> None:
    texts = [f"text number {number}, of some words" for number in range(400)]
    llm = AsyncLLM.of(engine_config_from(EMBEDDING_MODEL, {"device": "cpu"}), InChild())
    try:
        wanted = await llm.embed(texts)
        async with killing(llm, [signal.SIGKILL], 0.3):
            found = await llm.embed(texts * 3)
        for one, other in zip(found, wanted * 3, strict=True):
            assert one.embedding == pytest.approx(other.embedding, abs=1e-5)
        assert service_of(llm).restarts == 1
    finally:
        await llm.aclose()


async def test_aborts_free_at_once(llm: AsyncLLM) -> None:
    streams = [llm.stream([5, 6, number], LONG) for number in range(8)]
    for stream in streams[:4]:
        await anext(stream)
    grammar = llm.stream([5], SamplingParams(max_tokens=50, structured_outputs=StructuredOutputsParams(regex="[a-z]+")))
    asking = asyncio.ensure_future(anext(grammar))
    await asyncio.sleep(0.01)
    for stream in [*streams, grammar]:
        stream.close()
    asking.cancel()
    end = time.monotonic() + 5
    while True:
        stats = await asyncio.to_thread(llm.stats)
        if stats.running == stats.waiting == stats.blocks_used == 0:
            break
        assert time.monotonic() < end
    assert not service_of(llm)._ledger.entries
    assert service_of(llm)._ledger.waiting == 0


async def test_one_output_ended_by_a_stop_string_stays_ended_in_the_next_process(model: Path) -> None:
    params = SamplingParams(max_tokens=250, n=3, seed=3, ignore_eos=True, stop=["e", "a"])
    with here(model) as other:
        wanted = essence((await other.generate([[5, 6]], params))[0])
    with child(model) as llm:
        async with killing(llm, [signal.SIGKILL], 0.2):
            found = essence((await llm.generate([[5, 6]], params))[0])
    assert found == wanted


async def test_the_queue_is_bounded_and_told_of_room(model: Path) -> None:
    with child(model, max_num_seqs=1, max_queued_requests=2) as llm:
        first = llm.stream([5], LONG)
        await anext(first)
        waiting = [llm.stream([6, number], LONG) for number in range(2)]
        with pytest.raises(QueueFullError):
            llm.stream([7], LONG)
        room = asyncio.Event()
        loop = asyncio.get_running_loop()
        service_of(llm).when_room(lambda: loop.call_soon_threadsafe(room.set))
        assert not room.is_set()
        first.close()
        await asyncio.wait_for(room.wait(), 5)
        for stream in waiting:
            stream.close()
        outputs = await llm.generate([[5, 6, number] for number in range(6)], SamplingParams(max_tokens=3))
        assert [output.finished for output in outputs] == [True] * 6


async def test_closing_ends_what_runs_and_leaves_no_process(model: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with child(model) as llm:
        stream = llm.stream([5, 6], LONG)
        await anext(stream)
        await asyncio.to_thread(llm.close)
        with pytest.raises(EngineClosedError):
            async for _ in stream:
                pass
        with pytest.raises(EngineClosedError):
            await llm.generate([[5]])
    spare = SPARES._spare  # there is one while another test file's server runs here
    ours = set() if spare is None else {psutil.Process(spare[1].pid)}
    assert set(psutil.Process().children(recursive=True)) - ours <= before


async def test_an_idle_engine_may_lose_any_number_of_processes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far apart, as over weeks: here "far" is nothing."""
    monkeypatch.setattr(service, "SOUND_SECONDS", 0.0)
    with child(model) as llm:
        for lost in range(service.ATTEMPTS + 1):
            os.kill(pid_of(llm), signal.SIGKILL)
            end = time.monotonic() + 30
            while service_of(llm).restarts == lost or service_of(llm).pid is None:
                assert time.monotonic() < end, service_of(llm).failure
                await asyncio.sleep(0.02)
        assert (await llm.generate([[5]], SamplingParams(max_tokens=2)))[0].finished


async def test_a_model_that_is_broken_is_the_error_of_its_file(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelFileError, match=r"model\.safetensors"), child(tmp_path):
        pass
    with pytest.raises(RequestError, match="vocabulary"), child(model) as llm:
        llm.stream([5], SamplingParams(allowed_token_ids=[100_000]))


def test_the_engine_goes_first_where_memory_runs_out(llm: AsyncLLM) -> None:
    score = Path(f"/proc/{service_of(llm).pid}/oom_score_adj").read_text()
    assert int(score) > int(Path("/proc/self/oom_score_adj").read_text())


def test_what_is_no_message_ends_the_process_and_runs_nothing(tmp_path: Path) -> None:
    """A pickle that would make a file."""
    import pickle

    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/harm",)

    process, channel = spawn(InChild().program)
    channel.send(pickle.dumps(Harm()))
    assert process.wait(60) != 0
    assert not (tmp_path / "harm").exists()
    channel.close()
