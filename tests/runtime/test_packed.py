"""Models whose weights stay packed on the CPU: what the other path computes, within the error of 8-bit activations.

`test_batch_invariance.py` shows that their bits depend on nothing but the request.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver, stacked_logits
from files_fixtures import gguf_tensors, llama_metadata, write_gguf
from gguf.constants import GGMLQuantizationType
from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.errors import ConfigError, ModelFileError
from octavo.execute.build import Resolved, resolve_settings
from octavo.execute.packing import held_weights
from octavo.models.config import load_config
from octavo.models.gguf_file import GGUFFile
from octavo.models.packed_weights import RECIPES, Packing, load_packed
from octavo.models.sources import resolve
from octavo.models.weights import open_weights
from octavo_kernels.cpu.compiler import available
from octavo_kernels.cpu.quantise import quantise_q4, quantise_q8
from safetensors.torch import load_file, save_file
from test_batch_invariance import some_prompts
from tiny_models import PackedParts, Parts, make_model

if available():
    from octavo_kernels.cpu.packed import pack, unpack

pytestmark = pytest.mark.skipif(not available(), reason="needs AVX512-VNNI and AVX512-BF16")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-head-dim": {}, "llama-tied": {"head_dim": 32}, "llama3-rope": {"head_dim": 64},
    "mistral-window": {"head_dim": 32}, "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen2-window": {"num_attention_heads": 2, "num_key_value_heads": 2}, "qwen3": {}, "gqa-8-to-1": {"head_dim": 32},
}  # fmt: skip


def check_logits(path: Path, lengths: list[int], packing: Packing = "file", twin: Path | None = None) -> None:
    """Of the first token after prompts of these lengths, run in chunks: packed against `twin` in float32."""
    prompts = some_prompts(lengths, 300)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    found = []
    for parts in (PackedParts(path, packing), Parts(twin or path, torch.float32)):
        driver = Driver(parts.core(num_blocks=200, block_size=32, budget=48), record=True)
        driver.generate(prompts, params)
        found.append(torch.cat(stacked_logits(driver)))
    error = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    # twice what bfloat16 is apart: its mean over these families is 0.02 to 0.03
    assert error.mean() < 0.1, error
    assert error.max() < 0.3, error
    assert found[1].argmax(-1).unique().numel() > 2, "a weak test: always the same token"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_what_it_is_in_float32(name: str, tmp_path: Path) -> None:
    path = make_model(name, tmp_path, **FAMILIES[name])
    check_logits(path, [1, 5, 31, 32, 33, 64, 90, 130])


def rounded_twin(path: Path, folder: Path, packing: str) -> Path:
    """The model with its matrices as `packing` rounds them, as numbers."""
    shutil.copytree(path, folder)
    state = load_file(folder / "model.safetensors")
    for name, weight in state.items():
        table = "embed_tokens" in name or "lm_head" in name
        if weight.ndim == 2:
            kind, quantise = ("Q4_1", quantise_q4) if packing == "int4" and not table else ("Q8_0", quantise_q8)
            state[name] = unpack(pack(quantise(weight), kind, weight.shape[1]))[: len(weight)].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("packing", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_rounded_is_what_its_twin_is(name: str, packing: Packing, tmp_path: Path) -> None:
    """Against float32 on the same rounded weights: only activations and cache are apart."""
    path = make_model(name, tmp_path / "model", **FAMILIES[name])
    check_logits(path, [1, 5, 32, 33, 90], packing, rounded_twin(path, tmp_path / "twin", packing))


@pytest.mark.parametrize("packing", ["int8", "int4"])
def test_a_gguf_file_can_be_rounded_anew(packing: Packing, tmp_path: Path) -> None:
    """Its heads are in another order than the model's."""
    path = tiny_gguf(tmp_path / "file", {"": "F32"})
    twin = rounded_twin(tmp_path / "file", tmp_path / "twin", packing)
    check_logits(path, [1, 5, 33, 64], packing, twin)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2", "llama-head-dim", "qwen3"])
def test_dummy_weights_are_of_the_usual_size(name: str, quantization: str, tmp_path: Path) -> None:
    path = make_model(name, tmp_path, **FAMILIES[name])
    for file in path.glob("*.safetensors"):
        file.unlink()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    texts = []
    for _ in range(2):
        with LLM(str(path), quantization=quantization, load_format="dummy") as llm:
            assert (llm.engine.limits.packed, llm.engine.limits.weights) == (True, quantization)
            outputs = llm.generate([[5, 6, 7], list(range(2, 90))], params)
            texts.append([list(output.outputs[0].token_ids) for output in outputs])
            weights = llm.engine.service.call(lambda core: core.runner.model._weights)
            for packed in (weights.embedding, weights.head, weights.layers[1].qkv, weights.layers[0].down):
                found = unpack(packed)
                assert abs(found.mean()) < 0.002
                assert 0.018 < found.std() < 0.022
    assert texts[0] == texts[1]
    for output in outputs:
        assert all(-20 < entry.logprob <= 0 for place in output.outputs[0].logprobs for entry in place.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_do_not_fit_are_refused_by_name(name: str, bad: float, tmp_path: Path) -> None:
    path = make_model("llama-head-dim", tmp_path)
    state = load_file(path / "model.safetensors")
    state[name][3, 40] = bad
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match="not finite, or too large") as caught:
        LLM(str(path), quantization="int4")
    assert caught.value.field == name
    assert str(path) in str(caught.value)


def tiny_gguf(folder: Path, kinds: dict[str, str], **changes: Any) -> Path:
    """A Llama of 2 layers; `kinds`: part of a tensor's name -> its type, "Q4_0" where none fits."""
    sizes = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128}
    state = load_file(make_model("llama-head-dim", folder, **(sizes | changes)) / "model.safetensors")
    tensors = gguf_tensors(state, heads=2, kv_heads=1, permute=True)
    for name, array in tensors.items():
        if array.ndim == 2:
            kind = next((kind for part, kind in kinds.items() if part in name), "Q4_0")
            tensors[name] = (array, GGMLQuantizationType[kind])
    metadata = llama_metadata(64, heads=2, kv_heads=1, layers=2)
    metadata |= {"llama.attention.key_length": 32, "llama.attention.value_length": 32}
    return write_gguf(folder / "tiny.gguf", metadata, tensors)


KINDS = [{}, {"": "Q4_1"}, {"": "Q8_0"}, {"attn_q": "Q8_0", "ffn_down": "F16", "token": "Q4_1"}, {"": "BF16"}]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_every_type_of_a_gguf_file(kinds: dict[str, str], tmp_path: Path) -> None:
    """Against the same file dequantised: only activations and cache are rounded, and what had to become Q8_0."""
    path = tiny_gguf(tmp_path, kinds)
    check_logits(path, [1, 5, 33, 64, 90])


@pytest.mark.parametrize("part", ["blk.1.attn_q.weight", "blk.0.ffn_down.weight", "blk.1.attn_norm.weight"])
def test_a_file_with_a_scale_that_is_no_number_is_refused(part: str, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, {"attn": "Q4_1"})
    info = GGUFFile(path).tensors[part]
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + 4] = b"\x00\x7e\xc0\x7f"  # NaN in float16 at 0, in float32 over all four
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="not finite") as caught:
        PackedParts(path).core()
    assert caught.value.field is not None
    assert caught.value.field.startswith(f"model.layers.{part[4]}.")


@pytest.mark.parametrize(("key", "value", "field"), [
    ("llama.feed_forward_length", 160, "mlp.gate_proj"), ("llama.attention.head_count", 4, "self_attn.q_proj"),
    ("llama.embedding_length", 96, None), ("llama.block_count", 3, "model.layers.2"),
])  # fmt: skip
def test_a_file_whose_header_lies_about_sizes_is_refused(
    key: str, value: int, field: str | None, tmp_path: Path
) -> None:
    """The kernels believe the sizes: nothing may be read beyond a tensor."""
    path = tiny_gguf(tmp_path, {})
    config = load_config(resolve(str(path)))
    names = {
        "llama.feed_forward_length": "intermediate_size", "llama.attention.head_count": "num_heads",
        "llama.embedding_length": "hidden_size", "llama.block_count": "num_layers",
    }  # fmt: skip
    changed = replace(config, **{names[key]: value})
    changed = replace(changed, layer_windows=(0,) * changed.num_layers)
    parts = PackedParts(path)
    parts.config = changed
    with pytest.raises(ModelFileError) as caught:
        parts.core()
    assert "tiny.gguf" in str(caught.value)
    assert field is None or field in str(caught.value)


def test_the_default_model_chooses_what_it_chooses_in_float32(default_model: Path) -> None:
    """Of the tokens of its own greedy answers, float32 on the dequantised weights chooses nearly all alike, and gives
    them nearly the same probability."""
    questions = ["What is the capital of France?", "Write a haiku.", "Count from 1 to 20.", "Why is the sky blue?"]
    greedy = SamplingParams(temperature=0, max_tokens=48)
    with LLM(str(default_model)) as llm:
        assert llm.engine.limits.packed
        assert llm.engine.limits.weights == "Q4_1 + Q8_0 (GGUF)"
        answers = llm.chat([[{"role": "user", "content": q}] for q in questions], greedy)
        whole = [list(a.prompt_token_ids) + list(a.outputs[0].token_ids) for a in answers]
        ours = llm.generate(whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    with LLM(str(default_model), dtype="float32") as llm:
        assert not llm.engine.limits.packed
        theirs = llm.generate(whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    agree, apart = [], []
    for answer, a, b in zip(answers, ours, theirs, strict=True):
        for place in range(len(answer.prompt_token_ids), len(a.prompt_token_ids)):
            token = a.prompt_token_ids[place]
            reference = b.prompt_logprobs[place]
            agree.append(reference[token].rank == 1)
            apart.append(abs(a.prompt_logprobs[place][token].logprob - reference[token].logprob))
    assert len(agree) > 100
    assert sum(agree) / len(agree) > 0.95
    assert sum(apart) / len(apart) < 0.05


@pytest.mark.parametrize(("settings", "field"), [
    ({"dtype": "float32"}, "dtype"), ({"block_size": 16}, "block_size"), ({"quantization": "GGUF"}, "quantization"),
    ({"load_format": "dummy"}, "load_format"),
])  # fmt: skip
def test_what_does_not_go_with_it_is_refused(default_model: Path, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(default_model), **({"quantization": "gguf"} | settings))
    assert caught.value.field == field


@pytest.mark.parametrize("quantization", ["gguf", "int8", "int4"])
def test_what_it_needs_is_said(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path, {})
    for settings, field in (({"dtype": "float32"}, "dtype"), ({"block_size": 16}, "block_size")):
        with pytest.raises(ConfigError) as caught:
            chosen(path, quantization=quantization, **settings)
        assert caught.value.field == field
    narrow = make_model("llama-bias", tmp_path / "narrow") if quantization != "gguf" else path
    monkeypatch.setattr("octavo.execute.packing.packed_supports", lambda _: False)
    with pytest.raises(ConfigError, match="multiples of 32"):
        chosen(narrow, quantization=quantization)
    monkeypatch.setattr("octavo.execute.packing.cpu_kernels_available", lambda: False)
    with pytest.raises(ConfigError, match="leave it out on other machines") as caught:
        chosen(path, quantization=quantization)
    assert caught.value.field == "quantization"


def chosen(path: Path, **settings: Any) -> Resolved:
    config, files = EngineConfig(model=str(path), **settings), resolve(str(path))
    return resolve_settings(config, files, load_config(files))


def test_by_default_a_gguf_file_keeps_its_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path, {"token": "Q8_0"})
    assert chosen(path).packing == chosen(path, block_size=32).packing == "file"
    assert held_weights(load_config(resolve(str(path))), "file", torch.bfloat16).name == "Q4_0 + Q8_0 (GGUF)"
    for settings in (
        {"dtype": "bfloat16"}, {"dtype": "float32"}, {"load_format": "dummy"}, {"block_size": 16},
    ):  # fmt: skip
        assert chosen(path, **settings).packing is None
    assert chosen(tmp_path).packing is None  # safetensors, beside the file: the folder
    with monkeypatch.context() as patch:
        patch.setattr("octavo.execute.packing.packed_supports", lambda _: False)
        assert chosen(path).packing is None
    monkeypatch.setattr("octavo.execute.packing.cpu_kernels_available", lambda: False)
    assert chosen(path).packing is None


@pytest.mark.parametrize("packing", ["file", "int8", "int4"])
def test_the_size_that_is_reckoned_with_is_what_is_held(packing: Packing, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, {"token": "Q8_0", "ffn_down": "F16"}, vocab_size=320)
    files = resolve(str(path))
    config = load_config(files)
    with open_weights(files, config) as reader:
        weights = load_packed(reader, config, RECIPES[packing](reader))
    matrices = [weights.embedding, weights.head]
    matrices += [m for layer in weights.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    tensors = [t for m in matrices for t in (m.quants, m.scales, m.minima) if t is not None]
    assert held_weights(config, packing, torch.bfloat16).bytes == sum(t.nbytes for t in tensors)


def test_other_files_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GGUF file"):
        LLM(str(tiny_model), quantization="gguf")
