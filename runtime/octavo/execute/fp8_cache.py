"""The FP8 KV cache (`kv_cache_dtype="fp8"`): who may have one, and the scales of its keys and values.

Keys and values are stored as e4m3, a float of 8 bits from 2^-9 to 448, as quotients by a scale of their layer and KV
head. `octavo_kernels` writes and reads them. Called by `build`, once a model is loaded and before its steps are
recorded.

The scales come from the model itself, without a file: it runs once over random tokens with a cache of the ordinary
type, and the largest magnitude of each head, times `MARGIN`, becomes the largest number of e4m3. What goes beyond that
saturates. They are rounded up to powers of two, so that no multiplication with a scale loses a bit, whichever kernel
does it; a float's relative precision is the same under any scale, so nothing is lost by it.
"""

from __future__ import annotations

import torch

from octavo.attention.reference import ReferenceAttention
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.execute.context import ForwardContext, KVCache, StepInputs
from octavo.execute.graphs import Recorder
from octavo.execute.model import Model
from octavo.models.config import ModelConfig

FP8 = torch.float8_e4m3fn
CAPABILITY = (8, 9)
"""Of the first GPUs that convert e4m3 (Ada)."""
TOKENS = 512
MARGIN = 2.0
SMALLEST = 2.0**-40
"""Of a head whose keys or values are all zero."""
SEED = 20


def choose_cache_dtype(config: EngineConfig, device: torch.device) -> torch.dtype | None:
    """The type of keys and values in the cache; None: that of activations. Raises `ConfigError` where FP8 was asked for
    and cannot be."""
    if config.kv_cache_dtype == "auto":
        return None
    asked = f"kv_cache_dtype={config.kv_cache_dtype!r} needs an NVIDIA GPU of compute capability 8.9 or more"
    if device.type != "cuda":
        raise ConfigError(f"{asked}, this engine runs on {device.type!r}: leave it out", "kv_cache_dtype")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"{asked}, {name} has {major}.{minor}: leave it out", "kv_cache_dtype")
    return FP8


@torch.inference_mode()
def calibrated_scales(
    model: Model, config: ModelConfig, recorder: Recorder, *, dtype: torch.dtype, device: torch.device, max_tokens: int
) -> list[torch.Tensor]:
    """`KVCache.scales` by a step of random tokens, at most `max_tokens`."""
    count = min(TOKENS, max_tokens)
    # one block holds it all, beside the null block; attention by the oracle, which needs no kernel compiled for this
    shape = (2, config.num_kv_heads, count, config.head_dim)
    plain = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * config.num_layers)]
    kv = KVCache(plain[::2], plain[1::2])
    ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(SEED))
    position = torch.arange(count, device=device)
    first, both, whole = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([0], [0, count], [count]))
    inputs = StepInputs(
        ids.to(device), position, count + position, first, both, whole, first[None] + 1, count, host_rows=[0],
        counts=[count], lengths=[count], num_decodes=int(count == 1), max_query_len=count, max_seq_len=count,
    )  # fmt: skip
    context = ForwardContext(inputs, ReferenceAttention().prepare(inputs), kv)

    def forward() -> None:
        model.forward(context)

    recorder.prepare(forward)
    return [_scales(torch.stack([keys[1], values[1]])) for keys, values in zip(kv.keys, kv.values, strict=True)]


def _scales(numbers: torch.Tensor) -> torch.Tensor:
    """Of keys and values `[2, KH, tokens, D]`: `[2, KH]`."""
    wanted = numbers.float().abs().amax(dim=(2, 3)) * (MARGIN / torch.finfo(FP8).max)
    return torch.exp2(wanted.clamp_min(SMALLEST).log2().ceil())
