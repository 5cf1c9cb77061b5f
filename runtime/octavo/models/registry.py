"""Which class runs which architecture, and a clear answer for those that nothing runs yet."""

from __future__ import annotations

import torch

from octavo.errors import UnsupportedModelError
from octavo.models.config import ModelConfig
from octavo.models.llama import LlamaFamily

NATIVE = {
    "LlamaForCausalLM": LlamaFamily,
    "MistralForCausalLM": LlamaFamily,
    "Qwen2ForCausalLM": LlamaFamily,
    "Qwen3ForCausalLM": LlamaFamily,
}
"""Architectures with a fused implementation. One that runs any Hugging Face architecture would be asked where this has
none."""


def build_model(config: ModelConfig, *, max_len: int, dtype: torch.dtype, device: torch.device) -> LlamaFamily:
    """An instance with uninitialised weights. Raises `UnsupportedModelError` for an architecture without
    implementation."""
    native = NATIVE.get(config.architecture)
    if native is None:
        raise UnsupportedModelError(
            f"{config.architecture} is not supported yet; supported: {', '.join(sorted(NATIVE))}", field="architectures"
        )
    return native(config, max_len=max_len, dtype=dtype, device=device)
