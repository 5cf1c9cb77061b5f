"""M2M100 (with NLLB-200) and Marian: encoder-decoders with positions by sine and cosine, biases everywhere and one
embedding for encoder, decoder and head.

M2M100 has its norms in front of attention and MLP, Marian behind the sums; they count positions in other ways, and
Marian adds a bias to its logits. These are fields of `Seq2SeqConfig`. Source: Fan et al., "Beyond English-Centric
Multilingual Machine Translation" (2021); Junczys-Dowmunt et al., "Marian" (2018).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F

from octavo.attention.texts import TextBatch
from octavo.execute.context import ForwardContext, KVCache
from octavo.execute.rows import BestLogits
from octavo.layers.activated import ActivatedLinear
from octavo.layers.head import head_of
from octavo.layers.kv import write_kv
from octavo.layers.layer_norm import Norm
from octavo.layers.linear import Linear, ProductMaker, product_with
from octavo.models.seq2seq_config import Seq2SeqConfig


class _Mlp:
    def __init__(self, hidden: int, inner: int, activation: str, dtype: torch.dtype, device: torch.device) -> None:
        self.up = ActivatedLinear(hidden, inner, activation, dtype=dtype, device=device)
        self.down = Linear(inner, (hidden,), bias=True, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class _Layer:
    """What the layers of both sides share: a norm in front of each part, or behind each sum."""

    def __init__(self, config: Seq2SeqConfig, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self.pre_norm, self.name = config.pre_norm, name
        self.hidden = config.hidden_size
        self._dtype, self._device, self._eps = dtype, device, config.norm_eps
        self.linears: dict[tuple[str, ...], Linear] = {}
        self.norms: dict[str, Norm] = {}

    def linear(self, parts: int, *names: str) -> Linear:
        made = Linear(self.hidden, (self.hidden,) * parts, bias=True, dtype=self._dtype, device=self._device)
        self.linears[names] = made
        return made

    def norm(self, name: str) -> Norm:
        self.norms[name] = Norm(self.hidden, self._eps, self._dtype, self._device)
        return self.norms[name]

    def mlp(self, inner: int, activation: str) -> _Mlp:
        made = _Mlp(self.hidden, inner, activation, self._dtype, self._device)
        self.linears |= {("fc1",): made.up, ("fc2",): made.down}
        return made

    def before(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        return norm.of(x) if self.pre_norm else x

    def after(self, norm: Norm, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        return x + added if self.pre_norm else norm(x, added)

    def finish(self, make: ProductMaker) -> None:
        for linear in self.linears.values():
            linear.finish(make)

    def targets(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for names, linear in self.linears.items():
            found |= linear.targets(tuple(self.name + name for name in names))
        for name, norm in self.norms.items():
            found |= norm.targets(self.name + name)
        return found


class EncoderLayer(_Layer):
    def __init__(self, config: Seq2SeqConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, f"model.encoder.layers.{index}.", dtype, device)
        self.heads = config.encoder_heads
        self.qkv = self.linear(3, *(f"self_attn.{part}_proj" for part in "qkv"))
        self.out = self.linear(1, "self_attn.out_proj")
        self.mlp_part = self.mlp(config.encoder_intermediate_size, config.activation)
        self.attention_norm, self.mlp_norm = self.norm("self_attn_layer_norm"), self.norm("final_layer_norm")

    def forward(self, x: torch.Tensor, batch: TextBatch) -> torch.Tensor:
        attended = batch.attend(self.qkv(self.before(self.attention_norm, x)), self.heads, None)
        x = self.after(self.attention_norm, x, self.out(attended))
        return self.after(self.mlp_norm, x, self.mlp_part(self.before(self.mlp_norm, x)))


class DecoderLayer(_Layer):
    def __init__(self, config: Seq2SeqConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, f"model.decoder.layers.{index}.", dtype, device)
        self.index, self.heads, self.head_dim = index, config.num_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.qkv = self.linear(3, *(f"self_attn.{part}_proj" for part in "qkv"))
        self.out = self.linear(1, "self_attn.out_proj")
        self.cross_q = self.linear(1, "encoder_attn.q_proj")
        self.cross_kv = self.linear(2, "encoder_attn.k_proj", "encoder_attn.v_proj")
        self.cross_out = self.linear(1, "encoder_attn.out_proj")
        self.mlp_part = self.mlp(config.intermediate_size, config.activation)
        self.attention_norm, self.cross_norm = self.norm("self_attn_layer_norm"), self.norm("encoder_attn_layer_norm")
        self.mlp_norm = self.norm("final_layer_norm")

    def forward(self, x: torch.Tensor, context: ForwardContext, tokens: int) -> torch.Tensor:
        """`tokens`: of `x`; what follows is padding."""
        assert context.cross is not None
        cache, slots = context.kv.layers[self.index], context.inputs.slots
        qkv = self.qkv(self.before(self.attention_norm, x))
        write_kv(qkv[:tokens, self.hidden :], cache, slots[:tokens])
        q = qkv[:, : self.hidden].view(-1, self.heads, self.head_dim)
        attended = context.attention.attend(q, cache, scale=self.scale, window=0)
        x = self.after(self.attention_norm, x, self.out(attended.flatten(1)))
        q = self.cross_q(self.before(self.cross_norm, x)).view(-1, self.heads, self.head_dim)
        attended = context.cross.attend(q, cache, scale=self.scale, window=0)
        x = self.after(self.cross_norm, x, self.cross_out(attended.flatten(1)))
        return self.after(self.mlp_norm, x, self.mlp_part(self.before(self.mlp_norm, x)))


class M2M100Family:
    """`max_len`: tokens of a source or an output, at most."""

    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "model.shared.weight": (
            "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight",
        )
    }  # fmt: skip
    """Other names that checkpoints give to a tensor."""
    optional = frozenset({"final_logits_bias"})
    """Zeros where a checkpoint has none."""

    def __init__(self, config: Seq2SeqConfig, *, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.config, self.dtype = config, dtype
        m2m100 = config.model_type == "m2m_100"
        self.positions_skip_padding = config.pad_token_id if m2m100 else None
        self.embedding = empty(config.vocab_size, config.hidden_size)
        self.factor = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        table = m2m100_positions if m2m100 else marian_positions
        self.places = table(max_len, config.hidden_size, config.pad_token_id).to(device, dtype)
        layers = range(config.encoder_layers), range(config.num_layers)
        self.encoder = [EncoderLayer(config, index, dtype, device) for index in layers[0]]
        self.decoder = [DecoderLayer(config, index, dtype, device) for index in layers[1]]

        def final_norm() -> Norm | None:
            return Norm(config.hidden_size, config.norm_eps, dtype, device) if config.pre_norm else None

        self.encoder_norm, self.decoder_norm = final_norm(), final_norm()
        self.logits_bias = empty(1, config.vocab_size) if config.logits_bias else None

    def encode(self, batch: TextBatch) -> torch.Tensor:
        x = self._embedded(batch.ids, batch.positions)
        for layer in self.encoder:
            x = layer.forward(x, batch)
        return x if self.encoder_norm is None else self.encoder_norm.of(x)

    def remember(self, encoded: torch.Tensor, kv: KVCache, slots: torch.Tensor) -> None:
        for layer in self.decoder:
            write_kv(layer.cross_kv(encoded), kv.layers[layer.index], slots)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        inputs, tokens = context.inputs, sum(context.inputs.counts)
        places, pad = inputs.positions, self.positions_skip_padding
        if pad is not None:
            places = torch.where(inputs.input_ids == pad, pad, places + pad + 1)
        x = self._embedded(inputs.input_ids, places)
        for layer in self.decoder:
            x = layer.forward(x, context, tokens)
        return x if self.decoder_norm is None else self.decoder_norm.of(x)

    def _embedded(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return F.embedding(places, self.places).add_(F.embedding(ids, self.embedding), alpha=self.factor)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.logits(hidden)

    def best(self, hidden: torch.Tensor, count: int) -> BestLogits:
        return self._head.best(hidden, count)

    def adapt(self, given: set[str]) -> None:
        """The checkpoint has tensors of these names. Nothing depends on it here."""

    def finish(self, make: ProductMaker = product_with) -> None:
        """The weights are in place: products are made of them, packed where that is faster."""
        for layer in (*self.encoder, *self.decoder):
            layer.finish(make)
        self._head = head_of(self.embedding, None if self.logits_bias is None else self.logits_bias[0], make)

    def targets(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> where its tensor goes."""
        found = {"model.shared.weight": self.embedding}
        for layer in (*self.encoder, *self.decoder):
            found |= layer.targets()
        if self.encoder_norm is not None and self.decoder_norm is not None:
            found |= self.encoder_norm.targets("model.encoder.layer_norm")
            found |= self.decoder_norm.targets("model.decoder.layer_norm")
        if self.logits_bias is not None:
            found["final_logits_bias"] = self.logits_bias
        return found


def m2m100_positions(length: int, size: int, pad: int) -> torch.Tensor:
    """`[length + pad + 1, size]`: sines, then cosines; zeros for the padding token, after whose number texts begin."""
    half = size // 2
    rates = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(length + pad + 1).float()[:, None] * rates
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    table[pad] = 0
    return table


def marian_positions(length: int, size: int, pad: int) -> torch.Tensor:
    """`[length, size]`: sines, then cosines."""
    rates = 10000.0 ** (-2.0 * torch.arange(size // 2, dtype=torch.float64) / size)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
