"""Tiny encoder-decoders of every family with wide random weights (as in `tiny_models`), made by transformers, and
engines around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.execute.build import Resolved
from octavo.execute.seq2seq import core_around, load_seq2seq
from octavo.layers.linear import ProductMaker, product_with
from octavo.models.seq2seq_config import Seq2SeqConfig, load_seq2seq_config
from octavo.models.sources import resolve
from octavo.models.weights import SafetensorsWeights
from safetensors.torch import load_file, save_file

VOCABULARY = 160
LENGTH = 96

_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": LENGTH,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "n_positions": LENGTH,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "m2m100": ("m2m_100", _BART),
    "marian": ("marian", _BART | {
        "pad_token_id": VOCABULARY - 1, "decoder_start_token_id": VOCABULARY - 1, "activation_function": "swish",
        "scale_embedding": True, "forced_eos_token_id": None, "bad_words_ids": [[VOCABULARY - 1]],
    }),
    "t5": ("t5", _T5),
    "t5-v1.1": ("t5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _T5),
}  # fmt: skip
"""Model type and configuration by name."""


def make_seq2seq(name: str, folder: Path, *, seed: int = 0, spread: float = 1.0, **changes: Any) -> Any:
    """Write a model of `FAMILIES` into `folder`, float32, and return it as transformers reads it. Biases, norms and the
    biases by distance are random too. `spread`: less of it keeps rounding errors small, more makes tokens depend on all
    that comes before."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    kind, settings = FAMILIES[name]
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **(settings | changes))).float()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key and key.endswith("weight"):  # of both signs: a tied head would repeat its token
                value.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, value.shape) * 2 - 1)
            elif "relative" in key or "shared" in key:
                value.normal_(0.0, 1.0)
            elif "bias" in key:
                value.normal_(0.0, 0.1)
            else:
                value.normal_(0.0, spread * (0.3 if "t5" in name else 0.5))
        if kind == "marian":
            model.final_logits_bias.normal_(0.0, 1.0)
    model.save_pretrained(folder)
    if name == "t5-v1.1":
        _give_own_head(folder)
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def _give_own_head(folder: Path) -> None:
    """As the published files of version 1.1 have it."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 0.25 * torch.randn(tensors["shared.weight"].shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))


class Seq2SeqParts:
    """A loaded model, from which any number of cores are made."""

    def __init__(
        self, path: Path, dtype: torch.dtype = torch.float32, product: ProductMaker = product_with,
        length: int = LENGTH,
    ) -> None:  # fmt: skip
        self.files = resolve(str(path))
        self.config: Seq2SeqConfig = load_seq2seq_config(self.files)
        self.dtype, self.length = dtype, length
        with SafetensorsWeights(path) as reader:
            self.model = load_seq2seq(reader, self.config, self.resolved(num_blocks=length), product=product)

    def resolved(
        self, *, num_blocks: int = 65, block_size: int = 16, max_num_seqs: int = 16, budget: int = 64, depth: int = 0
    ) -> Resolved:
        length = min((num_blocks - 1) * block_size, self.length)
        return Resolved(
            torch.device("cpu"), self.dtype, block_size, num_blocks, length, max_num_seqs, max(budget, max_num_seqs),
            depth,
        )  # fmt: skip

    def core(self, *, caching: bool = True, **settings: int) -> EngineCore:
        return core_around(self.model, self.config, self.resolved(**settings), caching=caching)


def engine_config(path: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(model=str(path), **settings)
