"""How the KV cache of a GPU is sized, with numbers for a card: nothing here needs one. What a real card gives is held
against the same numbers in `test_gpu_memory.py`."""

from __future__ import annotations

import gc
import random
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.config import EngineConfig
from octavo.engine.service import EngineService
from octavo.errors import ConfigError
from octavo.execute import build
from octavo.execute.build import Resolved, build_core
from octavo.execute.sizing import Card, Sizes, blocks_on_gpu, ran_out, usable_length
from octavo.models.config import ModelConfig, load_config
from octavo.models.sources import resolve

GIB = 2**30
LLAMA3_8B = ModelConfig(
    "LlamaForCausalLM", "llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, None, 8192, False,
    layer_windows=(0,) * 32,
)  # fmt: skip
WEIGHTS = 16_060_522_496


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(model="m", **settings)


def sizes_for(config: EngineConfig, itemsize: int = 2, cache_itemsize: int = 2) -> Sizes:
    """As `resolve_settings` makes them."""
    model = LLAMA3_8B
    return Sizes(
        model=model, itemsize=itemsize, block_size=16,
        block_bytes=2 * model.num_layers * model.num_kv_heads * 16 * model.head_dim * cache_itemsize,
        max_num_seqs=config.max_num_seqs or 256, max_num_batched_tokens=config.max_num_batched_tokens or 8192,
        max_len=config.max_model_len or model.max_position,
    )  # fmt: skip


def blocks(config: EngineConfig, card: Card, weights: int = WEIGHTS, *, loaded: bool = False, **sizes: Any) -> int:
    return blocks_on_gpu(config, sizes_for(config, **sizes), card, weights, loaded=loaded)


H200 = Card(free=140 * GIB, total=141 * GIB, context=GIB // 2)


def test_everything_stays_within_the_share_and_within_what_is_free() -> None:
    """And not a block is given away where a share was asked for."""
    rng, made, refused = random.Random(1), 0, set()
    for _ in range(300):
        total = rng.randrange(16, 200) * GIB
        free = int(total * rng.uniform(0.3, 1))
        card = Card(free, total, min(total - free, GIB))
        asked = config(
            gpu_memory_utilization=rng.uniform(0.05, 1), max_num_seqs=rng.choice([1, 16, 256]),
            max_num_batched_tokens=rng.choice([256, 2048, 16384]),
        )  # fmt: skip
        weights, loaded, sizes = rng.randrange(40 * GIB), rng.random() < 0.5, sizes_for(asked)
        try:
            found = blocks_on_gpu(asked, sizes, card, weights, loaded=loaded)
        except ConfigError as error:
            refused.add(error.field)
            continue
        made += 1
        mine = found * sizes.block_bytes + sizes.step()
        assert mine + (0 if loaded else weights) <= free
        assert mine + weights + card.context <= total * asked.gpu_memory_utilization
        more = mine + sizes.block_bytes
        assert more + (0 if loaded else weights) > free or more + weights + card.context > (
            total * asked.gpu_memory_utilization - 1
        )
    assert made > 50
    assert refused == {"model", "gpu_memory_utilization"}


def test_weights_count_once_whether_they_are_loaded_or_to_come() -> None:
    after = replace(H200, free=H200.free - WEIGHTS)
    for asked in (config(), config(gpu_memory_utilization=0.5), config(kv_cache_memory=GIB)):
        assert blocks(asked, H200) == blocks(asked, after, loaded=True)


def test_bytes_for_the_cache_are_honoured_to_a_block() -> None:
    block = sizes_for(config()).block_bytes
    for extra in (0, 1, block - 1):
        assert blocks(config(kv_cache_memory=700 * block + extra), H200) == 700
    assert blocks(config(num_blocks=701), H200) == 701
    with pytest.raises(ConfigError, match="holds no KV cache") as caught:
        blocks(config(kv_cache_memory=2 * block - 1), H200)
    assert caught.value.field == "kv_cache_memory"


def test_the_default_is_moderate_and_holds_the_length_that_was_asked_for() -> None:
    assert blocks(config(), H200) == 256 * 1024 // 16 + 2
    assert blocks(config(max_num_seqs=1), H200) == 8192 // 16 + 2
    # 1 GiB is left beside weights and steps: half of it would not hold what one sequence may need
    tight = replace(H200, free=WEIGHTS + sizes_for(config()).step() + GIB)
    assert blocks(config(), tight) * sizes_for(config()).block_bytes <= GIB // 2
    asked = config(max_model_len=6000)
    assert usable_length(asked, 8192, blocks(asked, tight), 16) == 6000


@pytest.mark.parametrize("settings", [
    {}, {"max_model_len": 8192}, {"gpu_memory_utilization": 0.3}, {"num_blocks": 5000}, {"kv_cache_memory": 12 * GIB},
    {"max_num_seqs": 1024, "max_num_batched_tokens": 32768}, {"max_model_len": 8192, "max_num_seqs": 4},
    {"gpu_memory_utilization": 0.7, "max_num_seqs": 512},
])  # fmt: skip
def test_an_error_names_numbers_and_what_it_proposes_fits(settings: dict[str, Any]) -> None:
    seen: set[str] = set()
    for quarters in range(32, 288):
        card = Card(quarters * GIB // 4 - GIB // 2, quarters * GIB // 4, GIB // 2)
        try:
            blocks(config(**settings), card)
            continue
        except ConfigError as error:
            text, field = str(error), error.field
        assert f"weights take {WEIGHTS / GIB:.2f} GiB" in text
        assert f"{card.free / GIB:.2f} GiB of {card.total / GIB:.2f} GiB" in text
        assert field == "model" or field in settings
        ways = text.split("It would fit with ")[1].split("; or with ")
        for way in ways:
            changes = {name: float(value) if "." in value else int(value)
                       for name, value in re.findall(r"(\w+)=([\d.]+)", way)}  # fmt: skip
            seen |= set(changes)
            if changes:
                blocks(config(**(settings | changes)), card)
            elif "kv_cache_dtype" in way:
                seen.add("kv_cache_dtype")
                blocks(config(**settings), card, cache_itemsize=1)
            elif "weights take at most" in way:
                seen.add("weights")
                smaller = float(re.findall(r"at most ([\d.]+) GiB", way)[0]) - 0.01
                if smaller > 0:
                    blocks(config(**settings), card, int(smaller * GIB))
            else:
                assert ways == [way], "the last resort, although there are others"
    assert "weights" in seen or "kv_cache_memory" in seen
    if "max_model_len" in settings:
        assert "max_model_len" in seen
    if settings.get("max_num_seqs", 256) >= 256:
        assert {"max_num_seqs", "max_num_batched_tokens"} <= seen
    seen_shares = "gpu_memory_utilization" in seen
    assert seen_shares == ("gpu_memory_utilization" in settings)


def test_running_out_of_memory_is_recognised_whoever_says_it() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"), RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):  # fmt: skip
        assert ran_out(error)
        later = RuntimeError("the capture was invalidated")
        later.__context__ = error
        assert ran_out(later)
    assert not ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_start_that_runs_out_of_memory_gives_everything_back(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the error is kept, whose frames held what was made so far."""
    files = resolve(str(tiny_model))
    model, made = load_config(files), []

    def load(*_: Any, **__: Any) -> None:
        weights = torch.zeros(1000)
        made.append(weakref.ref(weights))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(build, "load_model", load)
    free = [10 * GIB]
    monkeypatch.setattr(Card, "of", lambda device: Card(free[0], 16 * GIB, 0))
    asked = config(max_num_seqs=4, kv_cache_memory=GIB)
    sizes = replace(sizes_for(asked), model=model, max_num_batched_tokens=256)
    resolved = Resolved(torch.device("cuda"), torch.bfloat16, 16, 1000, 512, 4, 256, 1, None, sizes)
    errors = []
    for free[0] in (10 * GIB, 2**28):
        service = EngineService(
            lambda: build_core(asked, files, model, resolved)[0], max_queued_requests=1
        )  # fmt: skip
        with pytest.raises(ConfigError, match="ran out of memory while the model was made ready") as caught:
            service.start()
        errors.append(caught.value)
    assert [error.field for error in errors] == ["kv_cache_memory", "model"]
    assert "Try again" in str(errors[0])
    assert "does not fit" in str(errors[1])
    gc.collect()
    assert len(made) == 2
    assert all(reference() is None for reference in made)


def test_what_a_failed_start_made_does_not_live_as_long_as_its_error() -> None:
    made = []

    def make() -> Any:
        thing = torch.zeros(1000)
        made.append(weakref.ref(thing))
        raise ValueError("no")

    service = EngineService(make, max_queued_requests=1)
    with pytest.raises(ValueError, match="no") as caught:
        service.start()
    assert caught.value.__traceback__ is not None
    assert made[0]() is None
