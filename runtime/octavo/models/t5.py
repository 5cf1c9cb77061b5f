"""T5, mT5 and what has their shape (Flan-T5, MADLAD-400): encoder-decoders without biases or positions, whose attention
knows how far away a token is.

RMSNorm in front of each part, no factor on the scores, one bias by distance for all layers of a side. Versions differ
in activation, gate and head: fields of `Seq2SeqConfig`. Source: Raffel et al., "Exploring the Limits of Transfer
Learning" (2020); Xue et al., "mT5" (2021); Kudugunta et al., "MADLAD-400" (2023).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from octavo_kernels import fused_add_rms_norm

from octavo.attention.texts import TextBatch
from octavo.execute.context import ForwardContext, KVCache
from octavo.execute.rows import BestLogits
from octavo.layers.activated import FUNCTIONS
from octavo.layers.distance import bias_by_distance, distance_bias
from octavo.layers.head import head_of
from octavo.layers.kv import write_kv
from octavo.layers.linear import Linear, ProductMaker, product_with
from octavo.models.seq2seq_config import Seq2SeqConfig


class _Part:
    """A norm and the products behind it, whose result is added to what came in."""

    def __init__(self, config: Seq2SeqConfig, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.eps, self._dtype, self._device = name, config.norm_eps, dtype, device
        self.norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.linears: dict[tuple[str, ...], Linear] = {}

    def linear(self, inputs: int, outputs: int, *names: str) -> Linear:
        made = Linear(inputs, (outputs,) * len(names), bias=False, dtype=self._dtype, device=self._device)
        self.linears[names] = made
        return made

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return fused_add_rms_norm(x, None, self.norm, self.eps)[0]

    def targets(self) -> dict[str, torch.Tensor]:
        found = {f"{self.name}.layer_norm.weight": self.norm}
        for names, linear in self.linears.items():
            found |= linear.targets(tuple(f"{self.name}.{name}" for name in names))
        return found


class SelfAttention(_Part):
    def __init__(
        self, config: Seq2SeqConfig, name: str, dtype: torch.dtype, device: torch.device, part: str = "SelfAttention"
    ) -> None:
        super().__init__(config, name, dtype, device)
        self.heads, self.head_dim, self.inner = config.num_heads, config.head_dim, config.num_heads * config.head_dim
        self.qkv = self.linear(config.hidden_size, self.inner, *(f"{part}.{letter}" for letter in "qkv"))
        self.out = self.linear(self.inner, config.hidden_size, f"{part}.o")


class CrossAttention(_Part):
    def __init__(self, config: Seq2SeqConfig, name: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, name, dtype, device)
        self.heads, self.head_dim, inner = config.num_heads, config.head_dim, config.num_heads * config.head_dim
        self.q = self.linear(config.hidden_size, inner, "EncDecAttention.q")
        self.kv = self.linear(config.hidden_size, inner, "EncDecAttention.k", "EncDecAttention.v")
        self.out = self.linear(inner, config.hidden_size, "EncDecAttention.o")


class Mlp(_Part):
    def __init__(
        self, config: Seq2SeqConfig, name: str, inner: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, name, dtype, device)
        self.gated, self.function = config.gated, FUNCTIONS[config.activation]
        halves = ("wi_0", "wi_1") if config.gated else ("wi",)
        self.up = self.linear(config.hidden_size, inner, *(f"DenseReluDense.{half}" for half in halves))
        self.down = self.linear(inner, config.hidden_size, "DenseReluDense.wo")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.up(self.normed(x))
        if self.gated:
            gate, other = inner.chunk(2, dim=-1)
            return x + self.down(self.function(gate) * other)
        return x + self.down(self.function(inner))


class EncoderLayer:
    def __init__(self, config: Seq2SeqConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        name = f"encoder.block.{index}.layer."
        self.attention = SelfAttention(config, name + "0", dtype, device)
        self.mlp = Mlp(config, name + "1", config.encoder_intermediate_size, dtype, device)
        self.parts: tuple[_Part, ...] = (self.attention, self.mlp)

    def forward(self, x: torch.Tensor, batch: TextBatch, bias: torch.Tensor) -> torch.Tensor:
        part = self.attention
        attended = batch.attend(part.qkv(part.normed(x)), part.heads, bias, 1.0)
        return self.mlp(x + part.out(attended))


class DecoderLayer:
    def __init__(self, config: Seq2SeqConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        self.index, name = index, f"decoder.block.{index}.layer."
        self.attention = SelfAttention(config, name + "0", dtype, device)
        self.cross = CrossAttention(config, name + "1", dtype, device)
        self.mlp = Mlp(config, name + "2", config.intermediate_size, dtype, device)
        self.parts: tuple[_Part, ...] = (self.attention, self.cross, self.mlp)

    def forward(self, x: torch.Tensor, context: ForwardContext, bias: torch.Tensor, tokens: int) -> torch.Tensor:
        """`bias` by distance; `tokens`: of `x`, what follows is padding."""
        assert context.cross is not None
        cache, part, cross = context.kv.layers[self.index], self.attention, self.cross
        qkv = part.qkv(part.normed(x))
        write_kv(qkv[:tokens, part.inner :], cache, context.inputs.slots[:tokens])
        q = qkv[:, : part.inner].view(-1, part.heads, part.head_dim)
        x = x + part.out(context.attention.attend(q, cache, scale=1.0, window=0, distance_bias=bias).flatten(1))
        q = cross.q(cross.normed(x)).view(-1, cross.heads, cross.head_dim)
        x = x + cross.out(context.cross.attend(q, cache, scale=1.0, window=0).flatten(1))
        return self.mlp(x)


class T5Family:
    """Lengths have no end, so `max_len` is for the signature that all families share."""

    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    }
    """Other names that checkpoints give to a tensor."""
    optional: ClassVar[frozenset[str]] = frozenset()
    positions_skip_padding: int | None = None

    def __init__(self, config: Seq2SeqConfig, *, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.config, self.dtype = config, dtype
        self.embedding = empty(config.vocab_size, config.hidden_size)
        self.head = self.embedding
        self.distances = empty(config.relative_buckets, config.num_heads)
        self.encoder_distances = empty(config.relative_buckets, config.num_heads)
        self.encoder = [EncoderLayer(config, index, dtype, device) for index in range(config.encoder_layers)]
        self.decoder = [DecoderLayer(config, index, dtype, device) for index in range(config.num_layers)]
        self.encoder_norm, self.decoder_norm = empty(config.hidden_size), empty(config.hidden_size)
        self.bias = empty(0)

    def encode(self, batch: TextBatch) -> torch.Tensor:
        x = F.embedding(batch.ids, self.embedding)
        bias = distance_bias(self.encoder_distances, batch.longest, self.config.relative_max_distance)
        for layer in self.encoder:
            x = layer.forward(x, batch, bias)
        return fused_add_rms_norm(x, None, self.encoder_norm, self.config.norm_eps)[0]

    def remember(self, encoded: torch.Tensor, kv: KVCache, slots: torch.Tensor) -> None:
        for layer in self.decoder:
            write_kv(layer.cross.kv(encoded), kv.layers[layer.index], slots)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        x, tokens = F.embedding(context.inputs.input_ids, self.embedding), sum(context.inputs.counts)
        for layer in self.decoder:
            x = layer.forward(x, context, self.bias, tokens)
        return fused_add_rms_norm(x, None, self.decoder_norm, self.config.norm_eps)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.logits(self._scaled(hidden))

    def best(self, hidden: torch.Tensor, count: int) -> BestLogits:
        return self._head.best(self._scaled(hidden), count)

    def _scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.config.hidden_size**-0.5 if self.config.scales_head else hidden

    def adapt(self, given: set[str]) -> None:
        """The checkpoint has tensors of these names. From version 1.1 on T5 has a head of its own."""
        if "lm_head.weight" in given and not given.isdisjoint({"shared.weight", "decoder.embed_tokens.weight"}):
            self.head = torch.empty_like(self.embedding)

    def _parts(self) -> list[_Part]:
        parts = [part for layer in self.encoder for part in layer.parts]
        return parts + [part for layer in self.decoder for part in layer.parts]

    def finish(self, make: ProductMaker = product_with) -> None:
        """The weights are in place: products are made of them, packed where that is faster."""
        for part in self._parts():
            for linear in part.linears.values():
                linear.finish(make)
        self.bias = bias_by_distance(self.distances, self.config.relative_max_distance)
        self._head = head_of(self.head, None, make)
        if self._head.copied and self.head is not self.embedding:
            self.head = self.head.new_empty(0)

    def targets(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> where its tensor goes."""
        distances = ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found = {
            "shared.weight": self.embedding,
            "encoder" + distances: self.encoder_distances,
            "decoder" + distances: self.distances,
            "encoder.final_layer_norm.weight": self.encoder_norm,
            "decoder.final_layer_norm.weight": self.decoder_norm,
        }
        for part in self._parts():
            found |= part.targets()
        if self.head is not self.embedding:
            found["lm_head.weight"] = self.head
        return found
