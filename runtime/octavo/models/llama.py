"""The Llama family, fused: Llama 2 and 3, SmolLM2, Mistral (sliding window), Qwen2 and 2.5 (QKV bias), Qwen3 (QK-norm).

One pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, RMSNorm, gated SiLU. The differences
between the models are fields of `ModelConfig`, not code. Checkpoint names are mapped by `targets`; Q, K, V and gate, up
are one product each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from octavo_kernels import RopeStep, fused_add_rms_norm, prepare_rope, rope_and_cache, row_linear

from octavo.execute.context import ForwardContext
from octavo.layers.linear import GatedLinear, Linear, Product, product_with
from octavo.layers.rope import cos_sin_table
from octavo.models.config import ModelConfig


class LlamaLayer:
    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        self.index = index
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.window = config.layer_windows[index]
        self.scale = self.head_dim**-0.5
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size

        def linear(inputs: int, *parts: int, bias: bool) -> Linear:
            return Linear(inputs, parts, bias=bias, dtype=dtype, device=device)

        def norm(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.qkv = linear(hidden, q, kv, kv, bias=config.qkv_bias)
        self.out = linear(q, hidden, bias=config.o_bias)
        self.gate_up = GatedLinear(hidden, (inner, inner), bias=config.mlp_bias, dtype=dtype, device=device)
        self.down = linear(inner, hidden, bias=config.mlp_bias)
        self.attention_norm, self.mlp_norm = norm(hidden), norm(hidden)
        self.q_norm = norm(self.head_dim) if config.qk_norm else None
        self.k_norm = norm(self.head_dim) if config.qk_norm else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, cos_sin: torch.Tensor, rope: RopeStep | None,
        context: ForwardContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        inputs, k_cache, v_cache = context.inputs, context.kv.keys[self.index], context.kv.values[self.index]
        kv_scales = context.kv.scales[self.index]
        normed, residual = fused_add_rms_norm(x, residual, self.attention_norm, self.eps)
        q = rope_and_cache(
            self.qkv(normed), cos_sin, inputs.positions, inputs.slots, k_cache, v_cache, self.heads, self.kv_heads,
            q_norm=self.q_norm, k_norm=self.k_norm, eps=self.eps, kv_scales=kv_scales, step=rope,
        )  # fmt: skip
        attended = context.attention.attend(
            q, k_cache, v_cache, scale=self.scale, window=self.window, kv_scales=kv_scales
        )
        x = self.out(attended.flatten(1))
        normed, residual = fused_add_rms_norm(x, residual, self.mlp_norm, self.eps)
        return self.down(self.gate_up(normed)), residual

    def forward_row(self, x: torch.Tensor, cos_sin: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The same for a step of one token: `x` is the residual stream, whose norms and sums are parts of the products
        (see `row_linear`)."""
        inputs, k_cache, v_cache = context.inputs, context.kv.keys[self.index], context.kv.values[self.index]
        kv_scales = context.kv.scales[self.index]
        qkv = row_linear(x, self.qkv.weight, self.qkv.bias, norm=self.attention_norm, eps=self.eps)
        q = rope_and_cache(
            qkv, cos_sin, inputs.positions, inputs.slots, k_cache, v_cache, self.heads, self.kv_heads,
            q_norm=self.q_norm, k_norm=self.k_norm, eps=self.eps, kv_scales=kv_scales,
        )  # fmt: skip
        attended = context.attention.attend(
            q, k_cache, v_cache, scale=self.scale, window=self.window, kv_scales=kv_scales
        )
        x = row_linear(attended.flatten(1), self.out.weight, self.out.bias, residual=x)
        gate_up = self.gate_up
        inner = row_linear(x, gate_up.weight, gate_up.bias, norm=self.mlp_norm, eps=self.eps, gated=True)
        return row_linear(inner, self.down.weight, self.down.bias, residual=x)

    def finish(self) -> None:
        for linear in (self.qkv, self.out, self.gate_up, self.down):
            linear.finish()

    def targets(self) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{self.index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        found = {
            prefix + "input_layernorm.weight": self.attention_norm,
            prefix + "post_attention_layernorm.weight": self.mlp_norm,
            **self.qkv.targets((attention + "q_proj", attention + "k_proj", attention + "v_proj")),
            **self.out.targets((attention + "o_proj",)),
            **self.gate_up.targets((mlp + "gate_proj", mlp + "up_proj")),
            **self.down.targets((mlp + "down_proj",)),
        }
        if self.q_norm is not None and self.k_norm is not None:
            found |= {attention + "q_norm.weight": self.q_norm, attention + "k_norm.weight": self.k_norm}
        return found


class LlamaFamily:
    """A decoder of the family. `max_len` bounds the positions (size of the rotary table)."""

    def __init__(self, config: ModelConfig, *, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = [LlamaLayer(config, index, dtype, device) for index in range(config.num_layers)]
        self.final_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.head = self.embedding if config.tie_word_embeddings else torch.empty_like(self.embedding)
        self.cos_sin = cos_sin_table(config, max_len, device)
        self._head_product: Product = lambda hidden: F.linear(hidden, self.head)
        self.fuses_rows = device.type == "cuda"
        """Steps of one token take `forward_row`."""

    def forward(self, context: ForwardContext) -> torch.Tensor:
        inputs = context.inputs
        x, residual = F.embedding(inputs.input_ids, self.embedding), None
        if self.fuses_rows and len(x) == 1:
            for layer in self.layers:
                x = layer.forward_row(x, self.cos_sin, context)
            return fused_add_rms_norm(x, None, self.final_norm, self.config.rms_norm_eps)[0]
        rope = prepare_rope(self.cos_sin, inputs.positions, inputs.slots, context.kv.keys[0])
        for layer in self.layers:
            x, residual = layer.forward(x, residual, self.cos_sin, rope, context)
        normed, _ = fused_add_rms_norm(x, residual, self.final_norm, self.config.rms_norm_eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head_product(hidden)

    def finish(self) -> None:
        """The weights are in place: pack them where that is faster."""
        for layer in self.layers:
            layer.finish()
        self._head_product, packed = product_with(self.head, None)
        if packed and self.head is not self.embedding:
            self.head = self.head.new_empty(0)

    def targets(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> where its tensor goes."""
        found = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.final_norm}
        for layer in self.layers:
            found |= layer.targets()
        if not self.config.tie_word_embeddings:
            found["lm_head.weight"] = self.head
        return found
