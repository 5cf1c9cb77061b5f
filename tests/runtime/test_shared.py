"""`SharedEngine`: nothing is loaded until it is used, all of one configuration share one engine, the last one ends
it."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from octavo import LLM, SamplingParams
from octavo.engine import registry
from octavo.errors import ConfigError, EngineClosedError, ModelNotFoundError
from octavo.shared import SharedEngine

SETTINGS = {"dtype": "float32", "num_blocks": 33, "max_model_len": 128}
FEW = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    gc.collect()  # what other files left
    before = registry.running()
    yield
    gc.collect()
    assert registry.running() == before


def open_engines(model: Path) -> int:
    return sum(config.model == str(model) for config in registry.running())


def test_it_starts_at_the_first_use_and_ends_with_the_last_user(own_model: Path) -> None:
    first, second = SharedEngine(str(own_model), **SETTINGS), SharedEngine(str(own_model), **SETTINGS)
    assert not first.started
    assert open_engines(own_model) == 0
    expected = first.llm.generate("abc", FEW)[0].outputs[0].token_ids
    assert second.started, "it is one engine"
    assert second.llm is first.llm
    first.close()
    first.close()
    assert second.llm.generate("abc", FEW)[0].outputs[0].token_ids == expected
    with pytest.raises(EngineClosedError, match="make a new one"):
        _ = first.llm
    second.close()
    assert open_engines(own_model) == 0


def test_a_user_that_never_used_it_keeps_it(own_model: Path) -> None:
    keeper = SharedEngine(str(own_model), **SETTINGS)
    engines = []
    for _ in range(2):
        user = SharedEngine(str(own_model), **SETTINGS)
        engines.append(user.llm.engine)
        user.close()
    assert engines[0] is engines[1]
    assert open_engines(own_model) == 1
    engines.clear()
    del keeper
    gc.collect()
    assert open_engines(own_model) == 0


def test_other_settings_are_another_engine_and_bad_ones_an_error_at_once(own_model: Path) -> None:
    one = SharedEngine(str(own_model), **SETTINGS)
    other = SharedEngine(str(own_model), **{**SETTINGS, "num_blocks": 34})
    assert one.llm.engine is not other.llm.engine
    one.close()
    other.close()
    with pytest.raises(ConfigError, match="max_model_len") as raised:
        SharedEngine(str(own_model), max_model_length=3)
    assert raised.value.field == "max_model_length"
    missing = SharedEngine(str(own_model / "not" / "there"))
    for _ in range(2):
        with pytest.raises(ModelNotFoundError):
            _ = missing.llm


def test_llm_and_async_llm_are_of_one_engine(own_model: Path) -> None:
    async def both() -> None:
        shared = SharedEngine(str(own_model), **SETTINGS)
        started = await shared.start()
        assert started is shared.async_llm is await shared.start()
        assert started.engine is shared.llm.engine
        output = await started.generate("abc", FEW)
        assert output[0].outputs[0].token_ids == shared.llm.generate("abc", FEW)[0].outputs[0].token_ids
        with LLM(str(own_model), **SETTINGS) as llm:
            assert llm.engine is started.engine
        shared.close()

    asyncio.run(both())


def test_many_threads_start_one_engine(own_model: Path) -> None:
    shared = [SharedEngine(str(own_model), **SETTINGS) for _ in range(8)]
    found: list[LLM] = []
    barrier = threading.Barrier(8)

    def use(one: SharedEngine) -> None:
        barrier.wait()
        found.append(one.llm)

    threads = [threading.Thread(target=use, args=(one,)) for one in shared]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    found.clear()
    for one in shared:
        one.close()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_one_more_user(own_model: Path, duplicate: object) -> None:
    shared = SharedEngine(str(own_model), **SETTINGS)
    engine = shared.llm.engine
    twin = duplicate(shared)  # type: ignore[operator]
    shared.close()
    assert twin.llm.engine is engine
    twin.close()
