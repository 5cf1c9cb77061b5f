"""What a model is: its shape, its rotary embedding, its end tokens. Read from `config.json` or a GGUF header.

Called by the loader, the registry of model families and the cache sizing. Nothing here imports torch. Every
value of a file is checked before it is believed: a bad one is a `ModelFileError` that names the file and the field;
something sound that Octavo does not implement is an `UnsupportedModelError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    from octavo.models.sources import ModelFiles

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""The architectures with a native implementation, as `config.json` spells them."""

_BY_MODEL_TYPE = {"llama": 0, "mistral": 1, "qwen2": 2, "qwen3": 3}
_DEFAULT_MAX_POSITION = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DTYPES = ("bfloat16", "float16", "float32")
_GENERATION_KEYS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_new_tokens", "do_sample",
)  # fmt: skip
_MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is "linear", "llama3", "yarn" or "factors".

    "factors" divides each frequency by one entry of `freq_factors` (`head_dim / 2` of them); GGUF files state the
    llama3 rule in this form. Fields which a kind does not use keep their defaults.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only model. Sizes are in elements, windows and positions in tokens."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    layer_windows: tuple[int, ...] = ()
    hidden_act: str = "silu"
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """What the model must not make, by its own configuration."""
    generation_defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    stored: tuple[tuple[str, int], ...] = field(default=(), compare=False, repr=False)
    """Type and elements of each matrix of a GGUF file."""


def load_config(files: ModelFiles) -> ModelConfig:
    """Read and check the configuration of a resolved model.

    Raises:
        ModelFileError: a file is missing, is not what it claims, or contradicts itself.
        UnsupportedModelError: the architecture or one of its settings is not implemented.
    """
    if files.format == "gguf":
        from octavo.models.gguf_config import gguf_config

        return gguf_config(files.path)
    path = files.path / "config.json"
    generation_path = files.path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return parse_config(read_json(path), file=str(path), generation=generation, generation_file=str(generation_path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; a `ModelFileError` if it is missing, too large, not JSON or not an object."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFileError(f"is larger than {_MAX_JSON_BYTES} bytes", file=str(path))
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError("is missing; a model folder needs it", file=str(path)) from None
    except RecursionError:
        raise ModelFileError("is nested too deeply", file=str(path)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"is not readable as JSON: {error}", file=str(path)) from error
    if not isinstance(value, dict):
        raise ModelFileError(f"holds a {type(value).__name__}, not a JSON object", file=str(path))
    return value


class Fields:
    """Checked access to the values of one file: each getter returns the right type or raises with file and field."""

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self.values, self.file, self.prefix = values, file, prefix

    def bad(self, key: str, message: str) -> ModelFileError:
        return ModelFileError(message, file=self.file, field=self.prefix + key)

    def unsupported(self, key: str, message: str) -> UnsupportedModelError:
        return UnsupportedModelError(message, file=self.file, field=self.prefix + key)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        """A whole number in `[low, high]`; null or missing gives `default`, or an error when that is None."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.bad(key, "is missing")
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key, f"must be a whole number, not {_short(value)}")
        if not low <= value <= high:
            raise self.bad(key, f"is {_short(value)}; it must lie between {low} and {high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in `(low, high]`; null or missing gives `default`, or an error when that is None."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.bad(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(key, f"must be a number, not {_short(value)}")
        if not low < value <= high:  # also false for NaN
            raise self.bad(key, f"is {_short(value)}; it must be above {low:g} and at most {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(key, f"must be true or false, not {_short(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.bad(key, "is missing")
            return default
        if not isinstance(value, str):
            raise self.bad(key, f"must be a string, not {_short(value)}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or nothing."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not -1 <= token < 2**31:
                raise self.bad(key, f"must be a token id or a list of them, not {_short(value)}")
        return tuple(token for token in ids if token >= 0)  # some files write -1 for "none"

    def token_id(self, key: str) -> int | None:
        ids = self.token_ids(key)
        return ids[0] if ids else None


def parse_config(
    values: Mapping[str, Any],
    *,
    file: str = "config.json",
    generation: Mapping[str, Any] | None = None,
    generation_file: str = "generation_config.json",
) -> ModelConfig:
    """Turn the object of a `config.json` (and of a `generation_config.json`) into a checked `ModelConfig`.

    Reads both spellings of the rotary settings: `rope_theta` with `rope_scaling`, and the `rope_parameters` that
    transformers 5 writes. Missing optional keys take the defaults of transformers' configuration classes.
    """
    f = Fields(values, file)
    architecture, family = _architecture(f)
    qwen = family in ("qwen2", "qwen3")
    if values.get("quantization_config") is not None:
        message = "quantised safetensors are not implemented; use the original weights"
        raise f.unsupported("quantization_config", message)
    hidden, heads = f.integer("hidden_size", high=1 << 20), f.integer("num_attention_heads", high=1 << 16)
    layers = f.integer("num_hidden_layers", high=4096)
    act = f.text("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise f.unsupported("hidden_act", f"{act!r} is not implemented; supported: silu")
    max_position = f.integer("max_position_embeddings", _DEFAULT_MAX_POSITION[family])
    theta, scaling = _rope(f, max_position)
    attention_bias = f.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    window, windows = _windows(f, family, layers)
    g = Fields(generation or {}, generation_file)
    eos = dict.fromkeys((*g.token_ids("eos_token_id"), *f.token_ids("eos_token_id")))
    return check_shape(
        ModelConfig(
            architecture=architecture,
            model_type=family,
            vocab_size=f.integer("vocab_size", high=1 << 24),
            hidden_size=hidden,
            intermediate_size=f.integer("intermediate_size", high=1 << 24),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=f.integer("num_key_value_heads", 8 if family == "mistral" else heads, high=1 << 16),
            head_dim=_head_dim(f, hidden, heads, family),
            rms_norm_eps=f.number("rms_norm_eps", 1e-6, high=1.0),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position=max_position,
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=f.flag("mlp_bias", False) if family == "llama" else False,
            qk_norm=family == "qwen3",
            sliding_window=window,
            layer_windows=windows,
            dtype=_dtype(f),
            eos_token_ids=tuple(eos),
            bos_token_id=f.token_id("bos_token_id") if qwen or "bos_token_id" in values else 1,
            pad_token_id=next((t for t in (*f.token_ids("pad_token_id"), *g.token_ids("pad_token_id"))), None),
            bad_word_ids=_bad_words(g),
            generation_defaults=_generation_defaults(g),
        ),
        f,
    )


def check_shape(config: ModelConfig, f: Fields) -> ModelConfig:
    """The checks between fields; returns `config` or raises `ModelFileError`."""
    if config.num_heads % config.num_kv_heads:
        message = f"{config.num_heads} heads cannot share {config.num_kv_heads} KV heads evenly"
        raise f.bad("num_key_value_heads", message)
    if config.head_dim % 2:
        raise f.bad("head_dim", f"is {config.head_dim}; rotary embeddings need an even head size")
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "factors" and len(scaling.freq_factors) != config.head_dim // 2:
        raise f.bad("rope_freqs", f"has {len(scaling.freq_factors)} factors for a head size of {config.head_dim}")
    if any(token >= config.vocab_size for token in config.eos_token_ids):
        raise f.bad("eos_token_id", f"{config.eos_token_ids} lies outside the vocabulary of {config.vocab_size}")
    return config


def _architecture(f: Fields) -> tuple[str, str]:
    named = f.values.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise f.bad("architectures", f"must be a list of names, not {_short(named)}")
    family = f.text("model_type", "")
    if named:
        architecture, where = named[0], "architectures"
    elif family in _BY_MODEL_TYPE:
        architecture, where = SUPPORTED_ARCHITECTURES[_BY_MODEL_TYPE[family]], "model_type"
    elif not family:
        raise f.bad("architectures", "is missing: this file does not say what kind of model it describes")
    else:
        architecture, where = family, "model_type"
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise f.unsupported(where, f"{_short(architecture)} is not implemented; supported: {_listed()}")
    return architecture, list(_BY_MODEL_TYPE)[SUPPORTED_ARCHITECTURES.index(architecture)]


def _listed() -> str:
    return ", ".join(SUPPORTED_ARCHITECTURES)


def _head_dim(f: Fields, hidden: int, heads: int, family: str) -> int:
    if f.values.get("head_dim") is not None:
        return f.integer("head_dim", high=4096)
    if family == "qwen3":
        return 128
    if hidden % heads:
        raise f.bad("hidden_size", f"{hidden} does not divide into {heads} heads, and head_dim is not given")
    return hidden // heads


def _dtype(f: Fields) -> str:
    key = "dtype" if f.values.get("dtype") is not None else "torch_dtype"
    name = f.text(key, "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise f.unsupported(key, f"{name!r} is not implemented; supported: {', '.join(_DTYPES)}")
    return name


def _windows(f: Fields, family: str, layers: int) -> tuple[int, tuple[int, ...]]:
    """The sliding window and one window per layer, 0 for full attention, as transformers' configurations define it."""
    if family == "llama" or (family != "mistral" and not f.flag("use_sliding_window", False)):
        return 0, (0,) * layers
    if "sliding_window" in f.values and f.values["sliding_window"] is None:
        return 0, (0,) * layers
    window = f.integer("sliding_window", 4096)
    if family == "mistral":
        return window, (window,) * layers
    types = f.values.get("layer_types")
    if types is None:
        first = f.integer("max_window_layers", 28, low=0)
        return window, tuple(window if layer >= first else 0 for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise f.bad("layer_types", f"must be a list with one entry for each of the {layers} layers")
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise f.unsupported("layer_types", f"{_short(kind)} is not implemented")
    return window, tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _rope(f: Fields, max_position: int) -> tuple[float, RopeScaling | None]:
    key = next((k for k in ("rope_parameters", "rope_scaling") if f.values.get(k) is not None), None)
    raw = f.values[key] if key else {}
    if not isinstance(raw, dict):
        raise f.bad(str(key), f"must be an object, not {_short(raw)}")
    r = Fields(raw, f.file, f"{key}.")
    theta = r.number("rope_theta", 0.0) or f.number("rope_theta", 10000.0)
    if (r if "partial_rotary_factor" in raw else f).number("partial_rotary_factor", 1.0, high=1.0) != 1.0:
        raise f.unsupported("partial_rotary_factor", "partial rotary embeddings are not implemented")
    kind = r.text("rope_type", r.text("type", "default"))
    if kind == "default":
        return theta, None
    return theta, rope_scaling(r, kind, max_position)


def rope_scaling(r: Fields, kind: str, max_position: int) -> RopeScaling:
    """The scaling of `kind` from the fields of `rope_scaling` / `rope_parameters`."""
    if kind == "linear":
        return RopeScaling(kind, factor=r.number("factor"))
    original = r.integer("original_max_position_embeddings", max_position)
    if kind == "llama3":
        low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
        if high <= low:
            raise r.bad("high_freq_factor", f"is {high:g}; it must exceed low_freq_factor, {low:g}")
        return RopeScaling(kind, r.number("factor"), low, high, original)
    if kind == "yarn":

        def optional(key: str) -> float | None:
            return None if r.values.get(key) is None else r.number(key)

        return RopeScaling(
            kind,
            factor=r.number("factor", max_position / original),
            original_max_position=original,
            attention_factor=optional("attention_factor"),
            beta_fast=r.number("beta_fast", 32.0),
            beta_slow=r.number("beta_slow", 1.0),
            mscale=optional("mscale"),
            mscale_all_dim=optional("mscale_all_dim"),
            truncate=r.flag("truncate", True),
        )
    raise r.unsupported("rope_type", f"{_short(kind)} is not implemented; supported: default, linear, llama3, yarn")


def _generation_defaults(g: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in _GENERATION_KEYS:
        value = g.values.get(key)
        if value is None:
            continue
        sound = isinstance(value, int | float) and isinstance(value, bool) == (key == "do_sample")
        if not sound or not math.isfinite(value):
            raise g.bad(key, f"cannot be {_short(value)}")
        found[key] = value
    return found


def _bad_words(f: Fields) -> tuple[tuple[int, ...], ...]:
    words = f.values.get("bad_words_ids")
    if words is None:
        return ()
    sound = isinstance(words, list) and len(words) <= 1024 and all(
        isinstance(word, list) and word and all(isinstance(token, int) and token >= 0 for token in word)
        for word in words
    )  # fmt: skip
    if not sound:
        raise f.bad("bad_words_ids", f"must be a list of lists of token ids, not {_short(words)}")
    return tuple(tuple(word) for word in words)


def _short(value: object) -> str:
    """`repr`, cut short: a file must not be able to flood a log."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer of more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
