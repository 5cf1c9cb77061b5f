"""The device operators of Octavo: Triton kernels, each with a plain-torch twin. Called by the `octavo` runtime only.

Every operator comes as `name` and `name_reference`. `name` looks at its first tensor: CUDA tensors go to the Triton
kernel, everything else to the twin, so this package imports and works where Triton is not installed. The twin is the
CPU path and the oracle of the tests at once. Triton itself is imported by the first call which needs it.

Words for shapes: `T` tokens in a step, `B` sequences, `H` query heads, `KH` KV heads, `D` head size. KV caches are
`[num_blocks, KH, block_size, D]`; a slot is `block * block_size + offset`.
"""

from octavo_kernels.activation import silu_and_mul, silu_and_mul_reference
from octavo_kernels.attention import paged_attention, paged_attention_reference
from octavo_kernels.draw import draw_tokens, draw_tokens_reference
from octavo_kernels.filter import top_k_top_p_min_p, top_k_top_p_min_p_reference
from octavo_kernels.forbid import forbid_tokens, forbid_tokens_reference
from octavo_kernels.gumbel import gumbel_sample, gumbel_sample_reference
from octavo_kernels.invariant import invariant_linear, invariant_linear_reference
from octavo_kernels.norm import fused_add_rms_norm, fused_add_rms_norm_reference
from octavo_kernels.rope import RopeStep, prepare_rope, rope_and_cache, rope_and_cache_reference
from octavo_kernels.row import row_linear, row_linear_reference
from octavo_kernels.steps import (
    enter_blocks,
    enter_blocks_reference,
    find_broken,
    find_broken_reference,
    step_inputs,
    step_inputs_reference,
)

__all__ = [
    "RopeStep",
    "draw_tokens",
    "draw_tokens_reference",
    "enter_blocks",
    "enter_blocks_reference",
    "find_broken",
    "find_broken_reference",
    "forbid_tokens",
    "forbid_tokens_reference",
    "fused_add_rms_norm",
    "fused_add_rms_norm_reference",
    "gumbel_sample",
    "gumbel_sample_reference",
    "invariant_linear",
    "invariant_linear_reference",
    "paged_attention",
    "paged_attention_reference",
    "prepare_rope",
    "rope_and_cache",
    "rope_and_cache_reference",
    "row_linear",
    "row_linear_reference",
    "silu_and_mul",
    "silu_and_mul_reference",
    "step_inputs",
    "step_inputs_reference",
    "top_k_top_p_min_p",
    "top_k_top_p_min_p_reference",
]
