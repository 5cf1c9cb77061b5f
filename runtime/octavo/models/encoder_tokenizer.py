"""The tokenizer of an embedding model, checked against its length. Called by the engine registry."""

from __future__ import annotations

import json

from octavo.errors import ConfigError
from octavo.models.encoder_config import EncoderConfig
from octavo.models.sources import ModelFiles
from octavo.tokenizer import Tokenizer, load_tokenizer


def load_encoder_tokenizer(
    files: ModelFiles, config: EncoderConfig, max_seq_length: int, *, trust_remote_code: bool
) -> Tokenizer:
    """Raises `ModelFileError` for an unsound tokenizer, `ConfigError` for a length with no room for text."""
    tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    tokenizer.check_against(config)
    backend = tokenizer.backend
    special = backend.num_special_tokens_to_add(False)
    if max_seq_length <= special:
        message = f"max_model_len={max_seq_length} leaves no room for text beside {special} special tokens"
        raise ConfigError(message, "max_model_len")
    if config.lower_case and not _lowers(json.loads(backend.to_str())["normalizer"]):
        from tokenizers.normalizers import Lowercase, Sequence

        own = backend.normalizer
        backend.normalizer = Lowercase() if own is None else Sequence([Lowercase(), own])
    return tokenizer


def _lowers(normalizer: dict[str, object] | None) -> bool:
    """Whether these rules put texts into lower case already."""
    if normalizer is None:
        return False
    parts = normalizer.get("normalizers")
    return normalizer.get("type") == "Lowercase" or normalizer.get("lowercase") is True or (
        isinstance(parts, list) and any(_lowers(part) for part in parts)
    )  # fmt: skip
