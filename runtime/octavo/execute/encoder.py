"""An embedding model on the device: from settings and files to a running `EmbedCore`, and one step of it.

Called by the engine registry; everything but `resolve_encoder` runs on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from octavo.attention.texts import TextBatch
from octavo.config import EngineConfig
from octavo.engine.embed_core import BatchLimits, EmbedCore
from octavo.engine.turns import PROCESS_CORES, Turn
from octavo.errors import ConfigError, ModelFileError
from octavo.execute.build import choose_device, limit_torch_threads
from octavo.execute.lost import is_lost
from octavo.layers.pooling import pool
from octavo.models.bert import BertFamily
from octavo.models.encoder_config import EncoderConfig
from octavo.models.loader import fill
from octavo.models.sources import ModelFiles
from octavo.models.weights import WeightReader, open_dummy, open_folder

Progress = Callable[[str, int, int | None], None]

_OF_A_CACHE = ("kv_cache_dtype", "block_size", "num_blocks", "kv_cache_memory", "gpu_memory_utilization")


@dataclass(frozen=True, slots=True)
class ResolvedEncoder:
    """What "auto" became on this machine."""

    device: torch.device
    dtype: torch.dtype
    max_seq_length: int
    limits: BatchLimits


def resolve_encoder(config: EngineConfig, model: EncoderConfig) -> ResolvedEncoder:
    """Decide everything that is left to the machine. Raises `ConfigError` for settings that an embedding model does not
    have."""
    for name in _OF_A_CACHE:
        if getattr(config, name) not in (None, "auto"):
            raise ConfigError(f"an embedding model has no KV cache: leave {name} out", name)
    if config.quantization is not None:
        raise ConfigError("an embedding model cannot be quantised yet: leave quantization out", "quantization")
    if config.deterministic:
        raise ConfigError("an embedding model cannot run deterministic yet: leave it out", "deterministic")
    if (config.max_model_len or 0) > model.longest:
        message = f"max_model_len={config.max_model_len} exceeds the {model.longest} positions that the model has"
        raise ConfigError(message, "max_model_len")
    device = choose_device(config)
    gpu = device.type == "cuda"
    # bfloat16 changes an embedding from the third decimal on, and indexes are kept: it must be asked for
    dtype: torch.dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    limits = BatchLimits(
        tokens=config.max_num_batched_tokens or (16384 if gpu else 1024),
        texts=config.max_num_seqs or (256 if gpu else 64),
    )
    return ResolvedEncoder(device, dtype, config.max_model_len or model.max_seq_length, limits)


def build_encoder(
    config: EngineConfig, files: ModelFiles, model: EncoderConfig, resolved: ResolvedEncoder, progress: Progress | None
) -> EmbedCore:
    """Load the model and put an engine around it. Raises `ModelFileError` where weights and configuration do not fit
    together."""
    threads = limit_torch_threads()
    loaded = BertFamily(model, dtype=resolved.dtype, device=resolved.device)
    dummy = config.load_format == "dummy"
    with open_dummy() if dummy else open_folder(files) as reader, torch.inference_mode():
        _fill(loaded, reader, dummy=dummy, progress=progress)
        loaded.finish()
    runner = EncoderRunner(loaded, resolved.dtype, resolved.device)
    on_cpu = resolved.device.type == "cpu"
    turns: AbstractContextManager[None] = Turn(PROCESS_CORES, threads) if on_cpu else nullcontext()
    return EmbedCore(runner, resolved.limits, turns=turns, is_lost=is_lost(resolved.device))


def _fill(model: BertFamily, reader: WeightReader, *, dummy: bool, progress: Progress | None) -> None:
    given = set(reader.names())
    targets = model.targets()
    places = targets if dummy else {_name(name, model, given, reader.place): dest for name, dest in targets.items()}
    targets = {}  # a view of a weight would keep it in memory
    fill(reader, places, progress)


def _name(name: str, model: BertFamily, given: set[str], place: str) -> str:
    """What the checkpoint calls a tensor: with the family's prefix if it has a head, and with other words for a norm if
    it is old."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    prefix = model.names.prefix
    for candidate in (name, prefix + name, old, prefix + old):
        if candidate in given:
            return candidate
    raise ModelFileError("the weights lack this tensor", place, name)


class EncoderRunner:
    """One step: token ids to embeddings."""

    def __init__(self, model: BertFamily, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device

    @torch.inference_mode()
    def encode(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor | None]:
        """Float32 `[dimension]` for each text, in the order of `texts`; None where it is not finite."""
        config = self.model.config
        batch = TextBatch(
            texts, pad_token_id=config.pad_token_id if config.first_position else None, dtype=self.dtype,
            device=self.device,
        )  # fmt: skip
        vectors = pool(self.model.forward(batch), batch, config.pooling)
        if config.normalize:
            vectors = F.normalize(vectors, dim=1)
        vectors = vectors.cpu()
        sound = torch.isfinite(vectors).all(dim=1).tolist()
        return [vector if finite else None for vector, finite in zip(vectors.unbind(0), sound, strict=True)]
