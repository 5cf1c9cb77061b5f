"""What an embedding model is: its shape, how token vectors become one, how long a text may be. Read from `config.json`
and the files that sentence-transformers keeps beside it.

Called by the engine registry and the command line; needs no torch. Checked as in `config.py`: a bad value is a
`ModelFileError` that names file and field, something sound that is not implemented an `UnsupportedModelError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.config import _BY_MODEL_TYPE, Fields, _dtype, _short, read_json
from octavo.models.sources import ModelFiles

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert")
"""The families with an implementation, by `model_type`."""
MODULE_FOLDER = re.compile(r"[0-9]{1,2}_[A-Za-z]{1,40}")
"""Where a module of sentence-transformers has its configuration."""
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
_OLD_MODES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
_LENGTH_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining")
"""Architectures whose weights are an encoder's, with at most a head that embeddings do not use."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder and what is done with its output. Sizes are in elements, lengths in tokens."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position: int
    """Rows of the table of positions."""
    first_position: int
    """The row of a text's first token: 0, or the one after the padding token's."""
    token_types: int
    layer_norm_eps: float
    activation: str
    """A value of `ACTIVATIONS`."""
    relative_buckets: int = 0
    """Of MPNet's bias by distance; 0 for models without one."""
    pad_token_id: int = 0
    dtype: str = "float32"
    max_seq_length: int = 0
    """Longer texts are cut to so many tokens, special tokens included."""
    lower_case: bool = False
    """Texts are put into lower case before the tokenizer's own rules."""
    pooling: tuple[str, ...] = ("mean",)
    """Values of `POOLING_MODES`; the results of several stand side by side."""
    pools_prompt: bool = True
    normalize: bool = False
    """Vectors have length 1."""
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What is put in front of a text, by name."""
    default_prompt: str = ""
    """What is put there when none is named."""

    @property
    def longest(self) -> int:
        """Tokens that have a position."""
        return self.max_position - self.first_position

    @property
    def dimension(self) -> int:
        """Numbers of an embedding."""
        return self.hidden_size * len(self.pooling)

    @property
    def parameters(self) -> int:
        """Numbers of all weights that an engine keeps."""
        hidden, inner = self.hidden_size, self.intermediate_size
        tables = (self.vocab_size + self.max_position + 2) * hidden + self.relative_buckets * self.num_heads
        return tables + self.num_layers * (4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + 5 * hidden)


def is_encoder(files: ModelFiles) -> bool:
    """Whether a resolved model makes embeddings: by its type, or because sentence-transformers saved it."""
    if files.format != "safetensors":
        return False
    kind = read_json(files.path / "config.json").get("model_type")
    if not isinstance(kind, str) or kind in _BY_MODEL_TYPE:
        return False
    return kind in ENCODERS or (files.path / "modules.json").is_file()


def load_encoder_config(files: ModelFiles) -> EncoderConfig:
    """Read and check the configuration of a model for which `is_encoder` is true.

    Raises:
        ModelFileError: a file is missing, is not what it claims, or contradicts itself.
        UnsupportedModelError: the model or one of its modules is not implemented.
    """
    folder = files.path
    f = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    saved = (folder / "modules.json").is_file()
    config = _shape(f, saved)
    length = _length(folder, config, f)
    config = replace(config, max_seq_length=length[0], lower_case=length[1])
    if saved:
        config = _with_modules(folder, config)
    return _with_prompts(folder, config)


def _shape(f: Fields, saved: bool) -> EncoderConfig:
    kind = f.text("model_type")
    if kind not in ENCODERS:
        raise f.unsupported("model_type", f"{_short(kind)} makes no embeddings yet; supported: {', '.join(ENCODERS)}")
    named = f.values.get("architectures") or [kind]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise f.bad("architectures", f"must be a list of names, not {_short(named)}")
    if not saved and named[0] != kind and not named[0].endswith(_HEADLESS):
        raise f.unsupported("architectures", f"{_short(named[0])} is a model for another task than embeddings")
    if f.flag("is_decoder", False):
        raise f.unsupported("is_decoder", "a decoder of this family is not implemented")
    if f.text("position_embedding_type", "absolute") != "absolute":
        raise f.unsupported("position_embedding_type", "only absolute positions are implemented")
    if f.values.get("quantization_config") is not None:
        raise f.unsupported("quantization_config", "quantised encoders are not implemented; use the original weights")
    small = kind == "distilbert"
    hidden = f.integer("dim" if small else "hidden_size", 768, high=1 << 16)
    heads = f.integer("n_heads" if small else "num_attention_heads", 12, high=1 << 12)
    if hidden % heads:
        raise f.bad("n_heads" if small else "num_attention_heads", f"{heads} heads do not divide {hidden} elements")
    act_key = "activation" if small else "hidden_act"
    act = f.text(act_key, "gelu")
    if act not in ACTIVATIONS:
        raise f.unsupported(act_key, f"{_short(act)} is not implemented; supported: {', '.join(ACTIVATIONS)}")
    padded = kind not in ("bert", "distilbert")
    pad = f.token_id("pad_token_id")
    pad = 1 if kind == "mpnet" or (padded and pad is None) else (pad or 0)
    first = pad + 1 if padded else 0
    positions = f.integer("max_position_embeddings", 512, high=1 << 20)
    if positions <= first + 1:
        raise f.bad("max_position_embeddings", f"is {positions}, which leaves no room for a text")
    return EncoderConfig(
        architecture=named[0],
        model_type=kind,
        vocab_size=f.integer("vocab_size", high=1 << 24),
        hidden_size=hidden,
        intermediate_size=f.integer("hidden_dim" if small else "intermediate_size", 3072, high=1 << 20),
        num_layers=f.integer("n_layers" if small else "num_hidden_layers", 12, high=1024),
        num_heads=heads,
        max_position=positions,
        first_position=first,
        token_types=0 if kind in ("mpnet", "distilbert") else f.integer("type_vocab_size", 2, low=0, high=1 << 10),
        layer_norm_eps=1e-12 if small else f.number("layer_norm_eps", 1e-12, high=1.0),
        activation=ACTIVATIONS[act],
        relative_buckets=f.integer("relative_attention_num_buckets", 32, low=4, high=1 << 12) if kind == "mpnet" else 0,
        pad_token_id=pad,
        dtype=_dtype(f),
    )


def _length(folder: Path, config: EncoderConfig, f: Fields) -> tuple[int, bool]:
    """The longest text in tokens, and whether texts are put into lower case. As in sentence-transformers: its own
    file, else the tokenizer's limit, and never more than there are positions."""
    path = next((folder / name for name in _LENGTH_FILES if (folder / name).is_file()), None)
    own = Fields(read_json(path) if path else {}, str(path))
    task = own.text("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise own.unsupported("transformer_task", f"{_short(task)} is not implemented")
    length = own.integer("max_seq_length", 0, low=0)
    if not length:
        settings = folder / "tokenizer_config.json"
        limit = (read_json(settings) if settings.is_file() else {}).get("model_max_length")
        # a tokenizer without a limit says 1e30
        sound = isinstance(limit, int | float) and not isinstance(limit, bool) and 1 <= limit < 1 << 31
        length = int(limit) if sound and limit is not None else config.longest
    return min(length, config.longest), own.flag("do_lower_case", False)


def _with_modules(folder: Path, config: EncoderConfig) -> EncoderConfig:
    """`config` with the pooling and the normalisation that `modules.json` names."""
    file = folder / "modules.json"
    kinds: list[str] = []
    for index, module in enumerate(_modules(file)):
        kind, path = _module(module, str(file), index)
        kinds.append(kind)
        own = folder / path / "config.json"
        if kind == "Pooling":
            config = _with_pooling(Fields(read_json(own), str(own)), config)
        elif kind == "Normalize":
            settings = Fields(read_json(own) if own.is_file() else {}, str(own))
            if settings.text("module_input_name", "sentence_embedding") != "sentence_embedding":
                raise settings.unsupported("module_input_name", "only whole embeddings are normalised")
            config = replace(config, normalize=True)
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
        message = f"the modules {', '.join(kinds)} in this order are not implemented; supported: Transformer, Pooling, "
        raise UnsupportedModelError(message + "and possibly Normalize", str(file))
    return config


def _modules(file: Path) -> list[Any]:
    try:
        if file.stat().st_size > 1 << 20:
            raise ModelFileError("is larger than a list of modules can be", str(file))
        modules = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"is not readable as JSON: {error}", str(file)) from error
    if not isinstance(modules, list) or not 1 <= len(modules) <= 32:
        raise ModelFileError("must be a list of modules", str(file))
    return modules


def _module(module: Any, file: str, index: int) -> tuple[str, str]:
    """Kind and folder of one module. A folder is a plain name beside the file, or "": anything else would let a model
    read files elsewhere."""
    if not isinstance(module, dict):
        raise ModelFileError("must be an object", file, f"{index}")
    f = Fields(module, file, f"{index}.")
    whole, path = f.text("type"), f.text("path", "")
    kind = whole.rpartition(".")[2]
    if not whole.startswith("sentence_transformers.") or kind not in ("Transformer", "Pooling", "Normalize"):
        raise f.unsupported("type", f"the module {_short(whole)} is not implemented")
    if kind == "Transformer" and path:
        raise f.unsupported("path", "the transformer must lie in the model's folder itself")
    if kind != "Transformer" and not MODULE_FOLDER.fullmatch(path):
        raise f.bad("path", f"{_short(path)} is not the name of a module's folder, such as '1_Pooling'")
    return kind, path


def _with_pooling(f: Fields, config: EncoderConfig) -> EncoderConfig:
    size_key = "embedding_dimension" if "embedding_dimension" in f.values else "word_embedding_dimension"
    size = f.integer(size_key, config.hidden_size)
    if size != config.hidden_size:
        raise f.bad(size_key, f"is {size}, but the model's vectors have {config.hidden_size} elements")
    return replace(config, pooling=_pooling_modes(f), pools_prompt=f.flag("include_prompt", True))


def _pooling_modes(f: Fields) -> tuple[str, ...]:
    value = f.values.get("pooling_mode")
    if value is None:
        old = [key for key in f.values if key.startswith("pooling_mode_") and f.flag(key, False)]
        unknown = [key for key in old if key not in _OLD_MODES]
        if unknown:
            raise f.unsupported(unknown[0][:80], "this way of pooling is not implemented")
        return tuple(mode for key, mode in _OLD_MODES.items() if key in old) or ("mean",)
    modes = [value] if isinstance(value, str) else value
    if not isinstance(modes, list) or not modes or not all(isinstance(mode, str) for mode in modes):
        raise f.bad("pooling_mode", f"must be a name or a list of names, not {_short(value)}")
    for mode in modes:
        if mode not in POOLING_MODES:
            message = f"{_short(mode)} is not implemented; supported: {', '.join(POOLING_MODES)}"
            raise f.unsupported("pooling_mode", message)
    if len(modes) > len(POOLING_MODES):
        raise f.bad("pooling_mode", "names more modes than there are")
    return tuple(modes)


def _with_prompts(folder: Path, config: EncoderConfig) -> EncoderConfig:
    path = folder / "config_sentence_transformers.json"
    f = Fields(read_json(path) if path.is_file() else {}, str(path))
    prompts = f.values.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise f.bad("prompts", "must be an object from names to texts")
    name = f.text("default_prompt_name", "")
    if name and name not in prompts:
        raise f.bad("default_prompt_name", f"{_short(name)} is not among the prompts")
    default = prompts.get(name, "") if name else ""
    if default and not config.pools_prompt:
        raise f.unsupported("default_prompt_name", "a prompt that is not pooled (include_prompt) is not implemented")
    return replace(config, prompts=dict(prompts), default_prompt=default)
