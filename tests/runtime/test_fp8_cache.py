"""An FP8 KV cache on the CPU, where the kernels' twins run: its scales, and that blocks of it are copied, found again
and computed again as others are. `test_gpu_fp8.py` has the same through `LLM` on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver
from octavo import LLM, ConfigError, SamplingParams
from octavo.attention.triton import TritonAttention
from octavo.engine.blocks import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import Scheduler
from octavo.execute.graphed_runner import GraphedRunner
from octavo.execute.graphs import CallAgain, StepGraphs
from octavo.execute.kv_cache import FP8, MARGIN, gpu_cache, measure_scales
from octavo.execute.table import RowTable
from tiny_models import Parts, make_model


class Fp8Parts(Parts):
    """The way of a GPU on the CPU, with keys and values in FP8."""

    def scales(self, tokens: int = 200) -> list[torch.Tensor]:
        return measure_scales(
            self.model, self.config, TritonAttention(self.config.num_kv_heads), block_size=16, dtype=self.dtype,
            device=self.device, max_len=tokens,
        )  # fmt: skip

    def core(self, *, num_blocks: int = 65, max_num_seqs: int = 16, budget: int = 64, **_: Any) -> EngineCore:
        scheduler = Scheduler(
            BlockPool(num_blocks, 16), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, clock=lambda: 0.0
        )
        table = RowTable(max_num_seqs, min((num_blocks - 1) * 16, 512), 16, self.config.vocab_size, self.device)
        kv = gpu_cache(self.config, num_blocks, 16, FP8, self.device, self.scales())
        attention = TritonAttention(self.config.num_kv_heads)
        graphs = StepGraphs(
            self.model, kv, table, attention, max_tokens=budget, hidden=self.config.hidden_size, dtype=self.dtype,
            recorder=CallAgain(),
        )  # fmt: skip
        graphs.capture()
        return EngineCore(scheduler, GraphedRunner(self.model, kv, table, attention, graphs), depth=1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Fp8Parts:
    return Fp8Parts(make_model("qwen3", tmp_path_factory.mktemp("model")), torch.float32)


def test_scales_leave_room_above_what_was_seen(parts: Fp8Parts) -> None:
    scales = parts.scales()
    assert len(scales) == parts.config.num_layers
    for layer in scales:
        assert layer.shape == (2, parts.config.num_kv_heads)
        assert layer.dtype == torch.float32
        assert (layer > 0).all()
    assert len(torch.cat(scales).unique()) == 2 * parts.config.num_layers * parts.config.num_kv_heads
    # twice the weights of the values: twice their scale, and what is stored stays within the type
    for layer in parts.model.layers:
        begin = (parts.config.num_heads + parts.config.num_kv_heads) * parts.config.head_dim
        layer.qkv.weight[begin:] *= 2
    doubled = parts.scales()
    for layer in parts.model.layers:
        layer.qkv.weight[begin:] /= 2
    torch.testing.assert_close(doubled[0][1], 2 * scales[0][1])
    torch.testing.assert_close(doubled[0][0], scales[0][0])
    core = parts.core()
    Driver(core).generate([[5, 6, 7] * 20])
    for layer in core.runner.kv.layers:
        largest = max(float(cache.float().abs().max()) for cache in (layer.keys, layer.values))
        assert 448 / MARGIN / 4 < largest <= 448


def test_a_head_without_a_finite_number_gets_1(tmp_path: Path) -> None:
    parts = Fp8Parts(make_model("llama-head-dim", tmp_path), torch.float32)
    parts.model.layers[0].qkv.weight[-1] = float("nan")
    scales = parts.scales(20)
    assert scales[0][1, -1] == 1
    assert all(layer.isfinite().all() for layer in scales)


def test_tokens_are_the_same_after_forks_hits_and_preemptions(parts: Fp8Parts) -> None:
    prompts = [[7 * n + i * i % 290 + 5 for i in range(length)] for n, length in enumerate((3, 16, 17, 40, 61))]
    prompts = [[token % 290 + 5 for token in prompt] for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    alone = [Driver(parts.core()).generate([prompt], params)[0] for prompt in prompts]
    assert Driver(parts.core()).generate(prompts, params) == alone
    core = parts.core()
    driver = Driver(core)
    assert [driver.generate([prompt], params)[0] for prompt in prompts + prompts] == alone + alone  # found in the cache
    tight = parts.core(num_blocks=12, max_num_seqs=8)
    assert Driver(tight).generate(prompts * 2, params) == alone + alone
    assert tight.scheduler.preemptions > 0
    forked = Driver(parts.core())
    request = forked.add(prompts[3], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, n=3))
    forked.run()
    assert [forked.tokens[request.request_id, index] for index in range(3)] == [alone[3]] * 3


@pytest.mark.parametrize(("asked", "message"), [
    ("fp8", "needs an NVIDIA GPU: leave it out on the CPU"), ("fp8_e4m3", "needs an NVIDIA GPU"),
    ("fp8_e5m2", "kv_cache_dtype must be one of auto, fp8, fp8_e4m3, not 'fp8_e5m2'"), (8, "must be one of"),
])  # fmt: skip
def test_what_it_needs_is_said(asked: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        LLM(str(make_model("llama-head-dim", tmp_path)), kv_cache_dtype=asked, device="cpu")
    assert raised.value.field == "kv_cache_dtype"
