"""Models whose weights stay packed on the CPU: what the other path computes, within the error of 8-bit activations.

`test_batch_invariance.py` shows that their bits depend on nothing but the request.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver, stacked_logits
from files_fixtures import gguf_tensors, llama_metadata, write_gguf
from gguf.constants import GGMLQuantizationType
from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, ModelFileError
from octavo.models.config import load_config
from octavo.models.sources import resolve
from octavo_kernels.cpu.compiler import available
from safetensors.torch import load_file
from test_batch_invariance import some_prompts
from tiny_models import PackedParts, Parts, make_model

pytestmark = pytest.mark.skipif(not available(), reason="needs AVX512-VNNI and AVX512-BF16")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-head-dim": {}, "llama-tied": {"head_dim": 32}, "llama3-rope": {"head_dim": 64},
    "mistral-window": {"head_dim": 32}, "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen2-window": {"num_attention_heads": 2, "num_key_value_heads": 2}, "qwen3": {}, "gqa-8-to-1": {"head_dim": 32},
}  # fmt: skip


def check_logits(path: Path, lengths: list[int]) -> None:
    """Of the first token after prompts of these lengths, run in chunks: packed against float32."""
    prompts = some_prompts(lengths, 300)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    found = []
    for parts in (PackedParts(path), Parts(path, torch.float32)):
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
    with LLM(str(default_model), quantization="gguf") as llm:
        assert llm.engine.limits.packed
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


def test_other_files_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GGUF file"):
        LLM(str(tiny_model), quantization="gguf")
