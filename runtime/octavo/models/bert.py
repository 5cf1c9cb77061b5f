"""The BERT family: BERT, RoBERTa, XLM-R and CamemBERT, MPNet, DistilBERT. Encoders: every token sees its whole text.

Post-norm layers with biases everywhere. What differs between the families is how their checkpoints name things
(`Names`), where positions begin (`EncoderConfig.first_position`), and MPNet's bias by distance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from octavo.attention.texts import TextBatch
from octavo.layers.activated import ActivatedLinear
from octavo.layers.distance import distance_bias
from octavo.layers.layer_norm import Norm
from octavo.layers.linear import Linear, ProductMaker, product_with
from octavo.models.encoder_config import EncoderConfig

MAX_DISTANCE = 128
"""From here on MPNet does not tell distances apart."""


@dataclass(frozen=True)
class Names:
    """Of one layer's parts in a checkpoint, after `layer` and the layer's number."""

    prefix: str
    """In front of all names, where the checkpoint has a head too."""
    layer: str
    qkv: tuple[str, str, str]
    out: str
    attention_norm: str
    up: str
    down: str
    output_norm: str


_BERT = Names(
    "bert.", "encoder.layer.", ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
_ROBERTA = replace(_BERT, prefix="roberta.")
NAMES = {
    "bert": _BERT, "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "camembert": _ROBERTA,
    "mpnet": Names(
        "mpnet.", "encoder.layer.", ("attention.attn.q", "attention.attn.k", "attention.attn.v"), "attention.attn.o",
        "attention.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
    ),
    "distilbert": Names(
        "distilbert.", "transformer.layer.", ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
    ),
}  # fmt: skip


class EncoderLayer:
    def __init__(self, config: EncoderConfig, names: Names, index: int, dtype: torch.dtype, device: torch.device):
        self.heads, self.names, self.prefix = config.num_heads, names, f"{names.layer}{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        self.qkv = Linear(hidden, (hidden, hidden, hidden), bias=True, dtype=dtype, device=device)
        self.out = Linear(hidden, (hidden,), bias=True, dtype=dtype, device=device)
        self.up = ActivatedLinear(hidden, inner, config.activation, dtype=dtype, device=device)
        self.down = Linear(inner, (hidden,), bias=True, dtype=dtype, device=device)
        self.attention_norm = Norm(hidden, config.layer_norm_eps, dtype, device)
        self.output_norm = Norm(hidden, config.layer_norm_eps, dtype, device)

    def forward(self, x: torch.Tensor, batch: TextBatch, bias: torch.Tensor | None) -> torch.Tensor:
        x = self.attention_norm(self.out(batch.attend(self.qkv(x), self.heads, bias)), x)
        return self.output_norm(self.down(self.up(x)), x)

    def finish(self, make: ProductMaker) -> None:
        for linear in (self.qkv, self.out, self.up, self.down):
            linear.finish(make)

    def targets(self) -> dict[str, torch.Tensor]:
        names, prefix = self.names, self.prefix
        query, key, value = names.qkv
        return {
            **self.qkv.targets((prefix + query, prefix + key, prefix + value)),
            **self.out.targets((prefix + names.out,)),
            **self.up.targets((prefix + names.up,)),
            **self.down.targets((prefix + names.down,)),
            **self.attention_norm.targets(prefix + names.attention_norm),
            **self.output_norm.targets(prefix + names.output_norm),
        }


class BertFamily:
    """An encoder of the family."""

    def __init__(self, config: EncoderConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        def table(rows: int, columns: int) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=device)

        self.config, self.names = config, NAMES[config.model_type]
        self.words = table(config.vocab_size, config.hidden_size)
        self.positions = table(config.max_position, config.hidden_size)
        self.types = table(config.token_types, config.hidden_size) if config.token_types else None
        self.norm = Norm(config.hidden_size, config.layer_norm_eps, dtype, device)
        self.distances = table(config.relative_buckets, config.num_heads) if config.relative_buckets else None
        self.layers = [EncoderLayer(config, self.names, index, dtype, device) for index in range(config.num_layers)]

    def forward(self, batch: TextBatch) -> torch.Tensor:
        """Vectors of all tokens, `[T, hidden_size]`."""
        x = self.norm(F.embedding(batch.ids, self.words), F.embedding(batch.positions, self.positions))
        bias = None if self.distances is None else distance_bias(self.distances, batch.longest, MAX_DISTANCE)
        for layer in self.layers:
            x = layer.forward(x, batch, bias)
        return x

    def finish(self, make: ProductMaker = product_with) -> None:
        """The weights are in place: products are made of them, packed where that is faster."""
        if self.types is not None:  # all tokens of a single text have type 0
            self.positions += self.types[0]
            self.types = None
        for layer in self.layers:
            layer.finish(make)

    def targets(self) -> dict[str, torch.Tensor]:
        """Checkpoint name, without the family's prefix -> where its tensor goes."""
        found = {
            "embeddings.word_embeddings.weight": self.words,
            "embeddings.position_embeddings.weight": self.positions,
            **self.norm.targets("embeddings.LayerNorm"),
        }
        if self.types is not None:
            found["embeddings.token_type_embeddings.weight"] = self.types
        if self.distances is not None:
            found["encoder.relative_attention_bias.weight"] = self.distances
        for layer in self.layers:
            found |= layer.targets()
        return found
