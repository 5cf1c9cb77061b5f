"""`models.config`: the same reading as transformers' of sound files, and a named place for every unsound one."""

# ruff: noqa: F811 - fixtures are imported by name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from files_fixtures import default_model, llama_metadata, write_gguf  # noqa: F401 - a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.config import ModelConfig, load_config, parse_config
from octavo.models.rope_frequencies import inverse_frequencies
from octavo.models.sources import ModelFiles

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    LLAMA3,
    YARN,
    {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {**YARN, "attention_factor": 0.75},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
]


def write(folder: Path, values: object, name: str = "config.json") -> ModelFiles:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return ModelFiles("m", folder, "safetensors", "local")


def sound(**changes: Any) -> dict[str, Any]:
    return {**SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **changes}


def their_windows(config: Any) -> tuple[int, ...]:
    """The window of each layer as transformers' modelling code decides it."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    if types is None or config.model_type == "mistral":
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": True}),
        ("Llama", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}, "eos_token_id": [2, 5], "dtype": "bfloat16"}),
        ("Mistral", {}),
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": 17, "head_dim": 32}),
        ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("Qwen3", {}),
        ("Qwen3", {"attention_bias": True, "head_dim": 16}),
        (
            "Qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
        ),
    ],
)
def test_reads_what_transformers_writes(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    import transformers

    theirs = getattr(transformers, f"{family}Config")(**{**SMALL, **options}, architectures=[f"{family}ForCausalLM"])
    theirs.save_pretrained(tmp_path)
    ours = load_config(ModelFiles("m", tmp_path, "safetensors", "local"))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.architecture == f"{family}ForCausalLM"
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size) == (300, 64, 96)
    assert (ours.num_layers, ours.num_heads) == (4, 4)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 16)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.layer_windows == their_windows(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    ends = theirs.eos_token_id
    assert ours.eos_token_ids == tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])
    # the biases and the norms that exist in the modelling code
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    layer = model.model.layers[0]
    assert ours.qkv_bias == (layer.self_attn.q_proj.bias is not None)
    assert ours.o_bias == (layer.self_attn.o_proj.bias is not None)
    assert ours.mlp_bias == (layer.mlp.down_proj.bias is not None)
    assert ours.qk_norm == hasattr(layer.self_attn, "q_norm")
    frequencies, scale = inverse_frequencies(ours)
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)
    assert scale == model.model.rotary_emb.attention_scaling


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(map(str, rope.values())))
def test_rotary_frequencies_are_transformers_bits(rope: dict[str, Any], old_style: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(**SMALL, max_position_embeddings=256, rope_parameters={"rope_theta": 500000.0, **rope})
    embedding = LlamaRotaryEmbedding(theirs)
    if old_style:
        given = {"rope_theta": 500000.0, "rope_scaling": {"type": rope["rope_type"], **rope}}
    else:
        given = {"rope_parameters": {"rope_theta": 500000.0, **rope}}
    ours = parse_config(sound(max_position_embeddings=256, **given))
    frequencies, scale = inverse_frequencies(ours)
    assert torch.equal(frequencies, embedding.inv_freq)
    assert scale == embedding.attention_scaling


def test_old_type_key_alone() -> None:
    config = parse_config(sound(rope_scaling={"type": "linear", "factor": 2}))
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 2.0)


def test_generation_config_adds_ends_and_defaults(tmp_path: Path) -> None:
    files = write(tmp_path, sound(eos_token_id=2))
    write(
        tmp_path,
        {"eos_token_id": [7, 2], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "bad_words_ids": [[5], [1, 2]]},
        "generation_config.json",
    )
    config = load_config(files)
    assert config.eos_token_ids == (7, 2)
    assert config.generation_defaults == {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    assert config.bad_word_ids == ((5,), (1, 2))
    assert hash(config) == hash(load_config(files))


def test_default_model(default_model: ModelFiles) -> None:
    config = load_config(default_model)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.intermediate_size, config.max_position, config.rope_theta) == (1536, 8192, 100000.0)
    assert (config.vocab_size, config.head_dim, config.tie_word_embeddings) == (49152, 64, True)
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((2,), 1, 2)
    assert config.rms_norm_eps == pytest.approx(1e-5)


def gguf_files(
    path: Path, changes: dict[str, Any], tensors: dict[str, Any] | None = None, arch: str = "llama"
) -> ModelFiles:
    metadata = {key: value for key, value in {**llama_metadata(arch=arch), **changes}.items() if value is not None}
    embedding = {"token_embd.weight": torch.zeros(50, 32).numpy()}
    write_gguf(path, metadata, embedding if tensors is None else {**embedding, **tensors}, arch)
    return ModelFiles("m", path, "gguf", "local")


def test_gguf_llama3_factors(tmp_path: Path) -> None:
    """llama.cpp's converter works the llama3 rule out to one factor a frequency; dividing by them gives it back."""
    expected = parse_config(sound(hidden_size=32, rope_parameters={"rope_theta": 10000.0, **LLAMA3}))
    plain = parse_config(sound(hidden_size=32, rope_parameters={"rope_theta": 10000.0}))
    factors = inverse_frequencies(plain)[0] / inverse_frequencies(expected)[0]
    config = load_config(gguf_files(tmp_path / "m.gguf", {}, {"rope_freqs.weight": factors.numpy()}))
    assert torch.allclose(inverse_frequencies(config)[0], inverse_frequencies(expected)[0], rtol=1e-6, atol=0)
    assert not torch.allclose(inverse_frequencies(config)[0], inverse_frequencies(plain)[0], rtol=1e-3)


def test_gguf_yarn_and_biases(tmp_path: Path) -> None:
    changes = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64,
    }
    bias = {"blk.0.attn_q.bias": torch.zeros(32).numpy(), "output.weight": torch.zeros(50, 32).numpy()}
    config = load_config(gguf_files(tmp_path / "m.gguf", changes, bias, "qwen2"))
    assert config.architecture == "Qwen2ForCausalLM"
    assert config.qkv_bias
    assert not config.o_bias
    assert not config.tie_word_embeddings
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.original_max_position) == ("yarn", 64)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count"),
        ({"llama.attention.head_count": 3}, "llama.embedding_length"),
        ({"llama.attention.head_count_kv": 3}, "llama.num_key_value_heads"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.rope_type"),
        ({"llama.attention.head_count": [4, 8]}, "llama.attention.head_count"),
        ({"tokenizer.ggml.eos_token_id": 50}, "eos_token_id"),
    ],
)
def test_unsound_gguf_metadata(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_config(gguf_files(tmp_path / "m.gguf", changes))
    assert caught.value.field is not None
    assert caught.value.field.endswith(field.removeprefix("llama."))
    assert caught.value.file == str(tmp_path / "m.gguf")


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="llama, qwen2, qwen3"):
        load_config(gguf_files(tmp_path / "m.gguf", {}, arch="gemma3"))


BAD = [
    ({"hidden_size": None}, "hidden_size"), ({"vocab_size": 0}, "vocab_size"), ({"vocab_size": -1}, "vocab_size"),
    ({"vocab_size": True}, "vocab_size"), ({"vocab_size": "300"}, "vocab_size"), ({"vocab_size": 1e300}, "vocab_size"),
    ({"vocab_size": 10**30}, "vocab_size"), ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_attention_heads": 5}, "hidden_size"), ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"), ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"), ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"), ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_theta": -1}, "rope_theta"), ({"head_dim": 15}, "head_dim"), ({"head_dim": [1]}, "head_dim"),
    ({"eos_token_id": "x"}, "eos_token_id"), ({"eos_token_id": [1, 300]}, "eos_token_id"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"), ({"architectures": "Llama"}, "architectures"),
    ({"architectures": [{}]}, "architectures"), ({"architectures": None, "model_type": None}, "architectures"),
    ({"hidden_act": 3}, "hidden_act"), ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
    ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_parameters.high_freq_factor"),
    ({"rope_parameters": {**YARN, "truncate": 2}}, "rope_parameters.truncate"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "field"), BAD)
def test_bad_values_are_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_config(write(tmp_path, sound(**changes)))
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "config.json"), field)
    assert not isinstance(caught.value, UnsupportedModelError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": None, "model_type": "mamba"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "rope_scaling.rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_unsupported_is_told_apart_from_unsound(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load_config(write(tmp_path, sound(**changes)))
    assert caught.value.field == field
    if field == "architectures":
        assert "Qwen3ForCausalLM" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"x"',
        '{"a": ' * 100_000,
        "[" * 500_000,
        "\xff",
        '{"vocab_size": 1' + "0" * 5000 + "}",
    ],
    ids=lambda text: text[:8],
)
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFileError) as caught:
        load_config(ModelFiles("m", tmp_path, "safetensors", "local"))
    assert caught.value.file == str(tmp_path / "config.json")


def test_missing_and_huge_config(tmp_path: Path) -> None:
    files = ModelFiles("m", tmp_path, "safetensors", "local")
    with pytest.raises(ModelFileError, match="missing"):
        load_config(files)
    with open(tmp_path / "config.json", "wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(ModelFileError, match="larger"):
        load_config(files)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({*SMALL, "architectures", "model_type", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
               "layer_types", "max_window_layers", "use_sliding_window", "eos_token_id", "bos_token_id", "pad_token_id",
               "head_dim", "dtype", "torch_dtype", "attention_bias", "rms_norm_eps", "hidden_act"})  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4)
)
def test_any_json_gives_a_config_or_a_model_file_error(family: str, changes: dict[str, Any]) -> None:
    values = {**SMALL, "model_type": family, **changes}
    try:
        config = parse_config(values, generation=changes)
    except ModelFileError:
        return
    assert isinstance(config, ModelConfig)
    assert config.num_heads % config.num_kv_heads == 0
    assert len(config.layer_windows) == config.num_layers
