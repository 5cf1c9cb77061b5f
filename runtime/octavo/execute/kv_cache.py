"""Makes the KV cache of an engine, and finds the scales of one in FP8. Called by `build`.

FP8 (e4m3: 4 bits of exponent, 3 of mantissa) halves what a step reads of keys and values. A number keeps its relative
precision of 2^-4 from 2^-6 to 448, so a scale need not be exact: it only has to bring the largest numbers of a head
below 448 and the usual ones well above 2^-6. So scales are measured once, when the engine starts, on some hundred
random tokens, with room for numbers that are larger; what is larger still is stored as 448. They are powers of two:
no multiplication with them loses a bit, so whoever reads the cache reads the same numbers.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

from __future__ import annotations

import math

import torch
from octavo_kernels.ahead import compiled_ahead
from octavo_kernels.rope import FP8_MAX

from octavo.attention.base import AttentionBackend
from octavo.execute.context import ForwardContext, KVCache, StepInputs
from octavo.execute.model import Model
from octavo.host_memory import zero_pages
from octavo.models.config import ModelConfig
from octavo.models.seq2seq_config import DecoderConfig

FP8 = torch.float8_e4m3fn
MARGIN = 2.0
"""How many times what was measured fits below 448, at least. Each factor of 2 costs one of 16 exponents."""
SMALLEST = 2.0**-40
"""Of a head whose keys or values are all zero."""
MEASURED_TOKENS = 512


def gpu_cache(
    model: DecoderConfig, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device,
    scales: list[torch.Tensor] | None = None,
) -> KVCache:  # fmt: skip
    """Keys and values of every layer by themselves. `scales`: of each layer, for FP8."""
    shape = (2 * model.num_layers, blocks, model.num_kv_heads, block_size, model.head_dim)
    return KVCache.of(torch.zeros(shape, dtype=dtype, device=device), scales)


def cpu_cache(model: DecoderConfig, blocks: int, block_size: int, dtype: torch.dtype, *, packed: bool) -> KVCache:
    """Pages are taken when they are first touched. `packed`: all layers of a block lie together, in large pages, so
    that memory is taken block by block, as they are first used."""
    layers, block = model.num_layers, (model.num_kv_heads, block_size, model.head_dim)
    memory = zero_pages(2 * layers * blocks * math.prod(block) * dtype.itemsize, large=packed).view(dtype)
    if packed:
        return KVCache.of(memory.view(blocks, 2 * layers, *block).transpose(0, 1))
    return KVCache.of(memory.view(2 * layers, blocks, *block))


@torch.inference_mode()
def measure_scales(
    model: Model, config: ModelConfig, attention: AttentionBackend, *, block_size: int, dtype: torch.dtype,
    device: torch.device, max_len: int,
) -> list[torch.Tensor]:  # fmt: skip
    """For each layer `[2, KH]` fp32: what stored keys and values are to be multiplied with. A head without a finite
    largest number gets 1: what it makes is broken in any type."""
    tokens = min(MEASURED_TOKENS, max_len)
    blocks = -(-tokens // block_size)
    kv = gpu_cache(config, blocks + 1, block_size, dtype, device)
    ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(tokens, device=device)
    ints = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    inputs = StepInputs(
        ids, positions, positions + block_size, ints[:1], ints, ints[1:],
        torch.arange(1, blocks + 1, dtype=torch.int32, device=device)[None], block_size, host_rows=[0],
        counts=[tokens], lengths=[tokens], num_decodes=0, max_query_len=tokens, max_seq_len=tokens,
    )  # fmt: skip

    def run() -> None:
        model.forward(ForwardContext(inputs, attention.prepare(inputs), kv))

    if device.type == "cuda":
        with compiled_ahead():
            run()
    run()
    largest = [torch.stack([cache.abs().amax(dim=(0, 2, 3)) for cache in (layer.keys, layer.values)])
               for layer in kv.layers]  # fmt: skip
    return [scales_for(numbers) for numbers in largest]


def scales_for(largest: torch.Tensor) -> torch.Tensor:
    """Scales under which numbers as large as these are at most half of what FP8 holds."""
    wanted = (largest.float() * (MARGIN / FP8_MAX)).clamp_min(SMALLEST).log2().ceil().exp2()
    return torch.where(wanted.isfinite(), wanted, 1.0)
