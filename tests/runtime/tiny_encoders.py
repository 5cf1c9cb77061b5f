"""Tiny embedding models of every family with wide random weights and a real tokenizer, written as
sentence-transformers lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import save_tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"type_vocab_size": 2}, "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1}, "mpnet": {"pad_token_id": 1},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48},
}  # fmt: skip
"""What a family's configuration has beside the sizes."""

POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}
"""Our names, and sentence-transformers'."""


def make_encoder(kind: str, pooling: str, folder: Path, **changes: Any) -> Any:
    """Write a model of `FAMILIES` into `folder` and return it as transformers has it."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 80, "initializer_range": 0.3,
    } | FAMILIES[kind] | changes  # fmt: skip
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings)).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "modules.json").write_text(json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]))  # fmt: skip
    modes = {f"pooling_mode_{name}": key == pooling for key, name in POOLINGS.items()}
    (folder / "1_Pooling").mkdir()
    size = {"word_embedding_dimension": model.config.hidden_size}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(size | modes))
    return model


def pooled(model: Any, ids: list[int], pooling: str) -> torch.Tensor:
    """What transformers' model makes of a text that is alone."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return {
        "mean": states.mean(0), "cls": states[0], "max": states.max(0).values, "lasttoken": states[-1]
    }[pooling]  # fmt: skip
