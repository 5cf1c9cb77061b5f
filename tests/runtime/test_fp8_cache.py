"""The FP8 KV cache where there is no GPU: its scales, who may have one, and the way of a GPU with the twins."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver
from octavo import LLM, SamplingParams
from octavo.attention.base import AttentionBackend, LayerCache, PreparedAttention
from octavo.attention.reference import ReferenceAttention
from octavo.attention.triton import _gathered, _whole_prompt
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.execute import context
from octavo.execute.build import Resolved, _fp8_cache
from octavo.execute.context import KVCache, StepInputs
from octavo.execute.kv_cache import FP8, SMALLEST, measure_scales, scales_for
from octavo.execute.runner import Runner
from octavo.execute.table import RowTable
from octavo_kernels import paged_attention_reference
from octavo_kernels.cpu.compiler import available
from tiny_models import FAMILIES, GraphedParts, Parts, make_model

PROMPTS = [[(7 * i + 3 * n) % 290 + 5 for i in range(length)] for n, length in enumerate((1, 16, 17, 40, 130))]


class Fp8Parts(GraphedParts):
    """As `build_core` makes it on a GPU, with the twins of the kernels."""

    def _runner(self, resolved: Resolved, kv: KVCache, table: RowTable, model: Any) -> Runner:
        scales = self.scales(resolved.max_model_len)
        self.kv = KVCache.of(torch.zeros(kv.memory.shape, dtype=FP8), scales)
        return super()._runner(resolved, self.kv, table, model)

    def scales(self, max_tokens: int) -> list[torch.Tensor]:
        return measure_scales(
            self.model, self.config, ReferenceAttention(), block_size=16, dtype=self.dtype, device=self.device,
            max_len=max_tokens,
        )  # fmt: skip


def forced_logprobs(core: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Of the prompts' own tokens, so that no choice of another token carries an error on."""
    driver = Driver(core)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    requests = [driver.add(prompt, params) for prompt in prompts]
    driver.run()
    assert not driver.errors
    entries = [entry for request in requests for entry in driver.prompt_logprobs.get((request.request_id, 0), [])]
    return torch.tensor([entry.logprob for entry in entries])


def tokens_of(core: Any, prompts: list[list[int]], **options: Any) -> list[list[list[int]]]:
    """Of all outputs of all prompts, each at its own seed."""
    driver = Driver(core)
    params = SamplingParams(**{"temperature": 1.2, "max_tokens": 24, "ignore_eos": True, **options})
    requests = [driver.add(prompt, params, seed=len(prompt)) for prompt in prompts]
    driver.run()
    assert not driver.errors
    return [[driver.tokens[request.request_id, index] for index in range(params.width)] for request in requests]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Fp8Parts:
    return Fp8Parts(make_model("qwen3", tmp_path_factory.mktemp("fp8")), torch.float32)


class Rounded(AttentionBackend):
    """The oracle over a cache of float32, every number of which is rounded to FP8 and back when it is read."""

    default_block_size = 16

    def __init__(self, kv: KVCache, scales: list[torch.Tensor]) -> None:
        self.scales = {layer.keys.data_ptr(): scale for layer, scale in zip(kv.layers, scales, strict=True)}

    def prepare(self, inputs: StepInputs) -> PreparedAttention:
        plain, scales = ReferenceAttention().prepare(inputs), self.scales

        class Prepared(PreparedAttention):
            def attend(self, q: torch.Tensor, cache: LayerCache, **options: Any) -> torch.Tensor:
                both = zip((cache.keys, cache.values), scales[cache.keys.data_ptr()][..., None, None], strict=True)
                k, v = (((c / s).clamp(-448, 448).to(FP8).float() * s) for c, s in both)
                return plain.attend(q, LayerCache(k, v), **options)

        return Prepared()


class RoundedParts(Fp8Parts):
    def _runner(self, resolved: Resolved, kv: KVCache, table: RowTable, model: Any) -> Runner:
        return Runner(self.model, kv, table, Rounded(kv, self.scales(resolved.max_model_len)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_computes_with_the_rounded_numbers(family: str, tmp_path: Path) -> None:
    """Every layer and head with its own scales, in chunks, from the prefix cache and in recorded steps."""
    path = make_model(family, tmp_path)
    source = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 300, (length,), generator=source).tolist() for length in (60, 200, 33)]
    prompts.append(prompts[1][:130] + prompts[0])
    wanted = forced_logprobs(RoundedParts(path, torch.float32).core(), prompts)
    parts = Fp8Parts(path, torch.float32)
    core = parts.core(budget=70)
    found = forced_logprobs(core, prompts)
    assert len(found) == sum(len(prompt) - 1 for prompt in prompts)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(forced_logprobs(core, prompts), wanted, atol=2e-4, rtol=1e-4)
    assert all(cache.dtype == FP8 and not cache[0].float().any() for cache in parts.kv.tensors)


@pytest.mark.parametrize("family", ["llama-head-dim", "qwen2", "qwen3", "mistral-window", "gqa-8-to-1"])
def test_logprobs_are_close_to_those_of_an_ordinary_cache(family: str, tmp_path: Path) -> None:
    """A number of e4m3 is off by 2^-4 of itself at most, 2.6 % root mean square. Sums over keys, dimensions and layers
    have errors of that order: 10 % of the spread of log-probabilities are allowed, 2 to 5.3 % were found. The weights
    are less wide than elsewhere: scores of ten and more make of 2.6 % another key."""
    path = make_model(family, tmp_path, initializer_range=0.1)
    source = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 300, (length,), generator=source).tolist() for length in (60, 200, 33)]
    wanted = forced_logprobs(Parts(path, torch.float32).core(), prompts)
    found = forced_logprobs(Fp8Parts(path, torch.float32).core(budget=100), prompts)
    assert 0 < (found - wanted).square().mean().sqrt() < 0.1 * wanted.std()


def test_forks_preemption_and_cached_prefixes_change_no_token(parts: Fp8Parts) -> None:
    alone = [tokens_of(parts.core(), [prompt])[0] for prompt in PROMPTS]
    assert tokens_of(parts.core(), PROMPTS) == alone
    core = parts.core()
    forked = tokens_of(core, PROMPTS, n=3)
    assert [outputs[:1] for outputs in forked] == alone
    assert all(one != other for outputs in forked[2:] for one, other in pairwise(outputs))
    assert tokens_of(core, PROMPTS, n=3) == forked, "from the prefix cache"
    small = parts.core(num_blocks=13)
    assert tokens_of(small, PROMPTS * 3) == alone * 3
    assert small.scheduler.preemptions > 0


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_copied_blocks_are_the_same_bits(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "COPIED_AT_ONCE", at_once)
    bits = torch.randint(0, 256, (2, 7, 2, 4, 8), dtype=torch.uint8)
    kv = KVCache.of(bits.clone().view(FP8), [torch.ones(2, 2)])
    kv.copy_blocks(torch.tensor([2, 1, 0]), torch.tensor([5, 2, 6]))
    for cache, before in zip((kv.layers[0].keys, kv.layers[0].values), bits, strict=True):
        assert torch.equal(cache.view(torch.uint8), before[[0, 1, 1, 3, 4, 2, 0]])


def test_scales_fit_what_the_model_computes(parts: Fp8Parts) -> None:
    """Powers of two under which the calibrating step's largest number is between 448 / 4 and 448 / 2; from fewer tokens
    where the engine takes no more."""
    found = parts.scales(512)
    core = parts.core()
    source = torch.Generator().manual_seed(0)
    Driver(core).generate([torch.randint(300, (200,), generator=source).tolist()])
    assert len(found) == parts.config.num_layers
    for layer, scales in zip(parts.kv.layers, found, strict=True):
        assert scales.shape == (2, parts.config.num_kv_heads)
        assert torch.equal(scales.log2(), scales.log2().round())
        for cache, scale in zip((layer.keys, layer.values), scales, strict=True):
            largest = cache.float().abs().amax(dim=(0, 2, 3))
            assert (largest >= 448 / 8).all(), "of 200 tokens: not much less than of 512"
            assert (largest <= 448 / 2).all()
            assert (scale > 0).all()
    assert len(parts.scales(1)) == parts.config.num_layers


def test_scales_of_a_step_by_hand() -> None:
    """The largest times 2 is at most 448 scales; a head of zeros has one too, and one that is broken."""
    assert scales_for(torch.tensor([224.0, 224.1, 1e-3, 0.0])).tolist() == [1, 2, 2.0**-17, SMALLEST]
    assert scales_for(torch.tensor([float("nan"), float("inf")])).tolist() == [1, 1]


def test_gathered_keys_of_a_long_prompt_are_exact() -> None:
    cache = torch.randn(6, 3, 4, 8).to(FP8)
    scales = torch.tensor([0.25, 2.0**-9, 64.0])
    blocks = torch.tensor([3, 1, 5])
    for dtype in (torch.bfloat16, torch.float32):
        found = _gathered(cache, blocks, scales, dtype)
        wanted = (cache.float() * scales[:, None, None])[blocks].transpose(0, 1).reshape(1, 3, 12, 8)
        assert found.dtype == dtype
        assert torch.equal(found.float(), wanted)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_whole_prompt_by_torch_is_that_of_our_own_attention(kv_heads: int) -> None:
    q, scales = torch.randn(50, 4, 64), 2.0 ** torch.randint(-4, 3, (2, kv_heads))
    k, v = (torch.randn(6, kv_heads, 16, 64).to(FP8) for _ in range(2))
    blocks = torch.tensor([3, 1, 5, 2, 0, 0])  # the last two only round the length up
    found = _whole_prompt(q, LayerCache(k, v, scales), blocks, 0.125)
    ends = torch.tensor([0, 50], dtype=torch.int32)
    wanted = paged_attention_reference(
        q, k, v, blocks[None].to(torch.int32), ends, ends[1:], max_query_len=50, max_seq_len=50, scale=0.125,
        kv_scales=scales,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_on_a_cpu_it_is_refused(kind: str, options: dict[str, Any], tiny_model: Path) -> None:
    if "quantization" in options and not available():
        pytest.skip("the weights are refused first: int8 needs AVX512-VNNI and AVX512-BF16")
    with pytest.raises(ConfigError, match=r"needs an NVIDIA GPU of compute capability 8\.9 .* leave it") as caught:
        LLM(str(tiny_model), device="cpu", kv_cache_dtype=kind, **options)
    assert caught.value.field == "kv_cache_dtype"


@pytest.mark.parametrize("kind", ["fp8_e5m2", "int8", "float16", None, 8])
def test_other_types_are_refused(kind: object) -> None:
    with pytest.raises(ConfigError, match="use 'auto', or 'fp8'") as caught:
        EngineConfig(model="m", kv_cache_dtype=kind)  # type: ignore[arg-type]
    assert caught.value.field == "kv_cache_dtype"


def test_which_gpus_may_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = EngineConfig(model="m", kv_cache_dtype="fp8"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability, takes in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        if takes:
            assert _fp8_cache(config, device)
        else:
            with pytest.raises(ConfigError, match=f"A100 has 8.{capability[1]}: leave it out") as caught:
                _fp8_cache(config, device)
            assert caught.value.field == "kv_cache_dtype"
    assert not _fp8_cache(EngineConfig(model="m"), device)


def test_the_type_is_reported(tiny_model: Path) -> None:
    with LLM(str(tiny_model), device="cpu", dtype="bfloat16", kv_cache_dtype="auto") as llm:
        assert llm.engine.limits.kv_cache_dtype == "bfloat16"
