"""What an encoder-decoder model is: its shape, where its output begins, what it may not make. Read from `config.json`
and `generation_config.json`.

Called by the engine registry; needs no torch. Checked as in `config.py`: a bad value is a `ModelFileError` that names
file and field, something sound that is not implemented an `UnsupportedModelError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models.config import Fields, ModelConfig, _bad_words, _dtype, _generation_defaults, _short, read_json
from octavo.models.encoder_config import ACTIVATIONS
from octavo.models.sources import ModelFiles

ARCHITECTURES = {
    "M2M100ForConditionalGeneration": "m2m_100",
    "MarianMTModel": "marian",
    "T5ForConditionalGeneration": "t5",
    "MT5ForConditionalGeneration": "mt5",
}
"""What is implemented, as `config.json` spells it: the architecture and its `model_type`."""
T5_LENGTH = 512
"""Tokens of a source or an output of a T5, where its configuration does not say: its positions have no end."""


@dataclass(frozen=True)
class Seq2SeqConfig:
    """The shape of an encoder-decoder. Sizes are in elements, lengths in tokens; what is not named after the encoder is
    the decoder's."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    encoder_intermediate_size: int
    num_layers: int
    encoder_layers: int
    num_heads: int
    encoder_heads: int
    head_dim: int
    encoder_head_dim: int
    max_position: int
    """Tokens that a source, and an output, may have."""
    norm_eps: float
    activation: str
    """A value of `ACTIVATIONS`."""
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    decoder_start_token_id: int
    dtype: str = "float32"
    scale_embedding: bool = False
    """Embeddings are multiplied with the root of `hidden_size`."""
    pre_norm: bool = True
    """Norms stand in front of attention and MLP, and one more behind the last layer; else behind each sum."""
    logits_bias: bool = False
    gated: bool = False
    """The MLP has two first halves, whose product goes on."""
    scales_head: bool = False
    """Final states are divided by the root of `hidden_size`."""
    relative_buckets: int = 0
    """Of the bias by distance, in encoder and decoder; 0 for models with positions."""
    relative_max_distance: int = 0
    never_ids: tuple[int, ...] = ()
    """Tokens that the model must not make, by its own configuration: Marian's padding."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """Runs of several tokens that it must not make."""
    forced_bos_token_id: int | None = None
    """The first token of every output, unless a language gives another."""
    generation_defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        """Of what matrices multiply."""
        heads = self.num_heads * self.head_dim, self.encoder_heads * self.encoder_head_dim
        return self.hidden_size, self.intermediate_size, self.encoder_intermediate_size, *heads

    @property
    def parameters(self) -> int:
        """Numbers in the matrices of the model; the head may be the embedding."""
        hidden, attention = self.hidden_size, 4 * self.hidden_size * self.num_heads * self.head_dim
        halves = 3 if self.gated else 2
        encoder = 4 * hidden * self.encoder_heads * self.encoder_head_dim + halves * hidden * (
            self.encoder_intermediate_size
        )
        decoder = 2 * attention + halves * hidden * self.intermediate_size
        return self.vocab_size * hidden + self.encoder_layers * encoder + self.num_layers * decoder


DecoderConfig = ModelConfig | Seq2SeqConfig
"""Of a model with a KV cache."""


def is_seq2seq(files: ModelFiles) -> bool:
    """Whether a resolved model has an encoder and a decoder, implemented or not."""
    if files.format != "safetensors":
        return False
    values = read_json(files.path / "config.json")
    named = values.get("architectures")
    known = isinstance(named, list) and bool(named) and named[0] in ARCHITECTURES
    return known or values.get("is_encoder_decoder") is True or values.get("model_type") in ARCHITECTURES.values()


def load_seq2seq_config(files: ModelFiles) -> Seq2SeqConfig:
    """Raises `ModelFileError` and `UnsupportedModelError`."""
    path, generation = files.path / "config.json", files.path / "generation_config.json"
    given = Fields(read_json(generation) if generation.is_file() else {}, str(generation))
    return parse_seq2seq_config(Fields(read_json(path), str(path)), given)


def parse_seq2seq_config(f: Fields, g: Fields) -> Seq2SeqConfig:
    """`f` and `g`: of `config.json` and `generation_config.json`. What is missing has transformers' default."""
    architecture, kind = _architecture(f)
    if f.values.get("quantization_config") is not None:
        raise f.unsupported("quantization_config", "quantised weights are not implemented; use the original ones")
    shape = _t5_shape(f, kind) if kind in ("t5", "mt5") else _bart_shape(f, kind)
    pads = {"m2m_100": 1, "marian": 58100, "t5": 0, "mt5": 0}
    pad = _first(g, f, "pad_token_id", pads[kind])
    starts = {"m2m_100": 2, "marian": 58100, "t5": pad, "mt5": pad}
    eos = dict.fromkeys((*g.token_ids("eos_token_id"), *f.token_ids("eos_token_id")))
    defaults = {"m2m_100": 2, "marian": 0, "t5": 1, "mt5": 1}
    forced = g.token_id("forced_bos_token_id")
    words = _bad_words(g) or _bad_words(f)
    config = Seq2SeqConfig(
        architecture=architecture,
        model_type=kind,
        pad_token_id=pad,
        eos_token_ids=tuple(eos) or (defaults[kind],),
        decoder_start_token_id=_first(g, f, "decoder_start_token_id", starts[kind]),
        never_ids=tuple(word[0] for word in words if len(word) == 1),
        bad_word_ids=tuple(word for word in words if len(word) > 1),
        forced_bos_token_id=f.token_id("forced_bos_token_id") if forced is None else forced,
        dtype=_dtype(f),
        generation_defaults=_generation_defaults(g),
        **shape,
    )
    tokens = (config.pad_token_id, *config.eos_token_ids, config.decoder_start_token_id, *config.never_ids)
    if max(tokens) >= config.vocab_size:
        raise f.bad("vocab_size", f"is {config.vocab_size}, but a special token is {max(tokens)}")
    return config


def _architecture(f: Fields) -> tuple[str, str]:
    named = f.values.get("architectures")
    if named is None:
        by_type = {kind: name for name, kind in ARCHITECTURES.items()}
        named = [by_type.get(f.text("model_type", ""), f.text("model_type", ""))]
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise f.bad("architectures", f"must be a list of names, not {_short(named)}")
    if named[0] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise f.unsupported("architectures", f"{_short(named[0])} is not implemented; supported: {known}")
    return named[0], ARCHITECTURES[named[0]]


def _bart_shape(f: Fields, kind: str) -> dict[str, Any]:
    """Of M2M100 and Marian."""
    if not f.flag("share_encoder_decoder_embeddings", True):
        message = "different embeddings of encoder and decoder are not implemented"
        raise f.unsupported("share_encoder_decoder_embeddings", message)
    hidden = f.integer("d_model", 1024, high=1 << 16)
    heads, encoder_heads = (
        f.integer(f"{part}_attention_heads", 16, high=1 << 12) for part in ("decoder", "encoder")
    )
    for count in (heads, encoder_heads):
        if hidden % count:
            raise f.bad("d_model", f"{hidden} does not divide into {count} heads")
    if hidden % 2:
        raise f.bad("d_model", f"is {hidden}; positions by sine and cosine need an even number")
    return {
        "vocab_size": f.integer("vocab_size", high=1 << 24),
        "hidden_size": hidden,
        "intermediate_size": f.integer("decoder_ffn_dim", 4096, high=1 << 20),
        "encoder_intermediate_size": f.integer("encoder_ffn_dim", 4096, high=1 << 20),
        "num_layers": f.integer("decoder_layers", 12, high=1024),
        "encoder_layers": f.integer("encoder_layers", 12, high=1024),
        "num_heads": heads,
        "encoder_heads": encoder_heads,
        "head_dim": hidden // heads,
        "encoder_head_dim": hidden // encoder_heads,
        "max_position": f.integer("max_position_embeddings", 1024, high=1 << 20),
        "norm_eps": 1e-5,
        "activation": _activation(f, "activation_function", "relu" if kind == "m2m_100" else "gelu"),
        "scale_embedding": f.flag("scale_embedding", kind == "m2m_100"),
        "pre_norm": kind == "m2m_100",
        "logits_bias": kind == "marian",
    }


def _t5_shape(f: Fields, kind: str) -> dict[str, Any]:
    projection = f.text("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    gated = projection.startswith("gated-")
    name = projection.removeprefix("gated-")
    activation = "gelu_tanh" if projection == "gated-gelu" else ACTIVATIONS.get(name)
    if activation is None:
        raise f.unsupported("feed_forward_proj", f"{_short(projection)} is not implemented")
    hidden = f.integer("d_model", 512, high=1 << 16)
    layers, heads = f.integer("num_layers", 6 if kind == "t5" else 8, high=1024), f.integer("num_heads", high=1 << 12)
    inner, head = f.integer("d_ff", 2048 if kind == "t5" else 1024, high=1 << 20), f.integer("d_kv", 64, high=4096)
    buckets = f.integer("relative_attention_num_buckets", 32, low=4, high=1 << 16)
    distance = f.integer("relative_attention_max_distance", 128, low=2, high=1 << 20)
    if buckets % 4 or distance <= buckets // 2:
        raise f.bad("relative_attention_num_buckets", f"{buckets} do not fit a largest distance of {distance}")
    return {
        "vocab_size": f.integer("vocab_size", high=1 << 24),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "encoder_intermediate_size": inner,
        "num_layers": f.integer("num_decoder_layers", layers, high=1024),
        "encoder_layers": layers,
        "num_heads": heads,
        "encoder_heads": heads,
        "head_dim": head,
        "encoder_head_dim": head,
        "max_position": f.integer("n_positions", T5_LENGTH, high=1 << 20),
        "norm_eps": f.number("layer_norm_epsilon", 1e-6, high=1.0),
        "activation": activation,
        "gated": gated,
        # as transformers has it: T5 1.0 ties its head and scales, and later ones say that they do not tie
        "scales_head": kind == "t5" and f.flag("scale_decoder_outputs", f.flag("tie_word_embeddings", True)),
        "relative_buckets": buckets,
        "relative_max_distance": distance,
    }


def _activation(f: Fields, key: str, default: str) -> str:
    name = f.text(key, default)
    if name not in ACTIVATIONS:
        raise f.unsupported(key, f"{_short(name)} is not implemented; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _first(g: Fields, f: Fields, key: str, default: int) -> int:
    for fields in (g, f):
        token = fields.token_id(key)
        if token is not None:
            return token
    return default


def refuse_on(config: Seq2SeqConfig, device: str) -> None:
    """Raises `UnsupportedModelError` for what a device does not run yet."""
    if device == "cuda" and config.relative_buckets:
        message = f"{config.architecture}: the bias by distance has no kernel for GPUs yet: use device='cpu'"
        raise UnsupportedModelError(message)
