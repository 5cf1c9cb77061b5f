"""The `ModelConfig` that a GGUF header states. Called by `config.load_config`; needs no torch.

Architectures "llama" (which covers Mistral), "qwen2" and "qwen3". llama.cpp's names for the keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models.config import Fields, ModelConfig, RopeScaling, check_shape, rope_scaling
from octavo.models.gguf_file import GGUFFile

_FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def gguf_config(path: Path) -> ModelConfig:
    """Read the header of `path`. Raises `ModelFileError` or `UnsupportedModelError`, as `load_config` does."""
    with GGUFFile(path) as gguf:
        return _config(gguf, str(path))


def _config(gguf: GGUFFile, file: str) -> ModelConfig:
    whole = Fields(gguf.metadata, file)
    arch = whole.text("general.architecture")
    if arch not in _FAMILIES:
        message = f"{arch[:60]!r} is not implemented; supported: {', '.join(_FAMILIES)}"
        raise UnsupportedModelError(message, file=file, field="general.architecture")
    prefix = f"{arch}."
    own = {key.removeprefix(prefix): value for key, value in gguf.metadata.items() if key.startswith(prefix)}
    f = Fields({key: _uniform(value) for key, value in own.items()}, file, prefix)
    if f.integer("expert_count", 0, low=0):
        raise f.unsupported("expert_count", "mixtures of experts are not implemented")
    hidden, heads = f.integer("embedding_length", high=1 << 20), f.integer("attention.head_count", high=1 << 16)
    layers = f.integer("block_count", high=4096)
    if own.get("attention.key_length") is None and hidden % heads:
        raise f.bad("embedding_length", f"{hidden} does not divide into {heads} heads")
    head_dim = f.integer("attention.key_length", hidden // heads, high=4096)
    if f.integer("attention.value_length", head_dim) != head_dim:
        raise f.unsupported("attention.value_length", "keys and values of different sizes are not implemented")
    if f.integer("rope.dimension_count", head_dim, low=0) not in (0, head_dim):
        raise f.unsupported("rope.dimension_count", "partial rotary embeddings are not implemented")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise whole.bad("token_embd.weight", "the embedding is missing or is not a matrix")
    max_position = f.integer("context_length")
    window = f.integer("attention.sliding_window", 0, low=0) if arch == "llama" else 0
    names = gguf.tensors
    probe = names.get("blk.0.attn_q.weight")
    return check_shape(
        ModelConfig(
            architecture=_FAMILIES[arch],
            model_type=arch,
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=f.integer("feed_forward_length", high=1 << 24),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=f.integer("attention.head_count_kv", heads, high=1 << 16),
            head_dim=head_dim,
            rms_norm_eps=f.number("attention.layer_norm_rms_epsilon", high=1.0),
            rope_theta=f.number("rope.freq_base", 10000.0),
            rope_scaling=_scaling(gguf, f, max_position),
            max_position=max_position,
            tie_word_embeddings="output.weight" not in names,
            qkv_bias="blk.0.attn_q.bias" in names,
            o_bias="blk.0.attn_output.bias" in names,
            mlp_bias="blk.0.ffn_down.bias" in names,
            qk_norm="blk.0.attn_q_norm.weight" in names,
            sliding_window=window,
            layer_windows=(window,) * layers,
            # quantised weights hold about 8 significant bits: bfloat16 loses nothing that matters
            dtype={"F32": "float32", "F16": "float16"}.get(probe.type_name if probe else "", "bfloat16"),
            eos_token_ids=tuple(
                dict.fromkeys(
                    token
                    for name in ("eos", "eot", "eom")
                    for token in whole.token_ids(f"tokenizer.ggml.{name}_token_id")
                )
            ),
            bos_token_id=whole.token_id("tokenizer.ggml.bos_token_id"),
            pad_token_id=whole.token_id("tokenizer.ggml.padding_token_id"),
            stored=tuple(
                (info.type_name, math.prod(info.shape)) for info in names.values() if len(info.shape) == 2
            ),
            generation_defaults={
                name: whole.number(f"general.sampling.{key}", low=-1.0)
                for key, name in _SAMPLING.items()
                if whole.values.get(f"general.sampling.{key}") is not None
            },
        ),
        f,
    )


def _uniform(value: Any) -> Any:
    """A per-layer list whose entries all agree stands for its one value; any other list stays and fails its check."""
    return value[0] if isinstance(value, list) and value and all(item == value[0] for item in value) else value


def _scaling(gguf: GGUFFile, f: Fields, max_position: int) -> RopeScaling | None:
    if "rope_freqs.weight" in gguf.tensors:  # llama 3.1 and later: the rule, worked out to one factor a frequency
        factors = gguf.floats("rope_freqs.weight")
        if not all(0 < factor < 1e9 for factor in factors):
            raise f.bad("rope_freqs.weight", "must hold positive finite factors")
        return None if all(factor == 1.0 for factor in factors) else RopeScaling("factors", freq_factors=tuple(factors))
    kind = f.text("rope.scaling.type", "linear" if "rope.scale_linear" in f.values else "none")
    if kind in ("none", ""):
        return None
    given = {
        "factor": f.values.get("rope.scaling.factor", f.values.get("rope.scale_linear")),
        "original_max_position_embeddings": f.values.get("rope.scaling.original_context_length"),
        "beta_fast": f.values.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": f.values.get("rope.scaling.yarn_beta_slow"),
    }
    if kind == "linear" and given["factor"] in (None, 0, 1):
        return None
    return rope_scaling(Fields(given, f.file, f.prefix + "rope.scaling."), kind, max_position)
