"""How an engine starts, in whichever process it runs: the side that needs torch (`start_service`), the side that needs
none (`load_front`), and both in one process (`InProcess`). Called by the registry and by the engine's child process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module

from octavo.config import EngineConfig
from octavo.decode.grammar import Grammars
from octavo.engine.contract import Compiler, Core, Service
from octavo.engine.service import EngineService
from octavo.errors import RequestError
from octavo.models.config import ModelConfig, load_config
from octavo.models.encoder_config import EncoderConfig, is_encoder, load_encoder_config
from octavo.models.seq2seq_config import DecoderConfig, Seq2SeqConfig, is_seq2seq, load_seq2seq_config
from octavo.models.sources import EMBEDDING_MODEL, ModelFiles, Progress, resolve
from octavo.tokenizer import Tokenizer, load_tokenizer
from octavo.translation.scheme import Scheme, load_scheme

Shape = ModelConfig | Seq2SeqConfig | EncoderConfig
Wrap = Callable[[Core], Core]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to, and what "auto" became."""

    max_model_len: int
    vocab_size: int
    device: str
    dtype: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    packed: bool
    """Weights are packed and steps run as programs of CPU kernels (see `models/llama_packed.py`)."""
    weights: str
    """How the weights are held, for a report: "bfloat16", "int4", "Q4_1 + Q8_0 (GGUF)"."""
    weight_bytes: int
    kv_cache_dtype: str


@dataclass(frozen=True, slots=True)
class Front:
    """What makes requests of texts, and texts of what comes back."""

    tokenizer: Tokenizer
    grammars: Grammars
    scheme: Scheme | None = None


@dataclass(slots=True)
class Engine:
    """A running engine and what its callers need to talk to it."""

    config: EngineConfig
    files: ModelFiles
    shape: DecoderConfig | EncoderConfig
    tokenizer: Tokenizer
    service: Service
    limits: Limits
    grammars: Compiler
    seconds_to_ready: float
    scheme: Scheme | None = None
    """Of an encoder-decoder: how it is told what to do."""
    users: int = 0

    @property
    def model_config(self) -> DecoderConfig:
        """Of a model that makes text. Raises `RequestError` for one that does not."""
        if isinstance(self.shape, EncoderConfig):
            raise RequestError(f"{self.config.model} makes embeddings, no text: use embed()", "model")
        return self.shape

    def check_generates(self) -> None:
        """Raises `RequestError` for a model that makes no text."""
        _ = self.model_config

    @property
    def encoder(self) -> EncoderConfig:
        """Of a model that makes embeddings. Raises `RequestError` for one that does not."""
        if not isinstance(self.shape, EncoderConfig):
            message = f"{self.config.model} makes text, no embeddings: use a model such as {EMBEDDING_MODEL!r}"
            raise RequestError(message, "model")
        return self.shape


Run = Callable[[ModelFiles, "Shape"], tuple[Service, Limits]]


def start_engine(config: EngineConfig, progress: Progress | None, run: Run) -> Engine:
    """An engine whose service `run` starts, wherever that is; the tokenizer loads meanwhile. Raises what is wrong with
    the settings or the files."""
    began = time.monotonic()
    files = find_files(config, progress)
    shape = load_shape(files)
    with ThreadPoolExecutor(1) as background:
        loading = background.submit(load_front, config, files, shape)
        service, limits = run(files, shape)
        try:
            front = loading.result()
        except BaseException:
            service.close()
            raise
    seconds = time.monotonic() - began
    return Engine(config, files, shape, front.tokenizer, service, limits, front.grammars, seconds, front.scheme)


class InProcess:
    """The placement of an engine that is a thread of its caller's process."""

    def start(self, config: EngineConfig, progress: Progress | None) -> Engine:
        """See `Placement`."""
        return start_engine(config, progress, lambda files, shape: start_service(config, files, shape, progress))


IN_PROCESS = InProcess()


def find_files(config: EngineConfig, progress: Progress | None) -> ModelFiles:
    """Those of the model, fetched if need be."""
    return resolve(
        config.model, revision=config.revision, token=config.token, progress=progress,
        need_weights=config.load_format != "dummy", allow_pickle=config.allow_pickle,
    )  # fmt: skip


def load_shape(files: ModelFiles) -> Shape:
    """Raises `ModelFileError`."""
    if is_encoder(files):
        return load_encoder_config(files)
    if is_seq2seq(files):
        return load_seq2seq_config(files)
    return load_config(files)


# ---------------------------------------------------------------- without torch


def load_front(config: EngineConfig, files: ModelFiles, shape: Shape) -> Front:
    """Raises `ModelFileError` where tokenizer and model do not fit together."""
    trusted = config.trust_remote_code
    if isinstance(shape, EncoderConfig):
        from octavo.models.encoder_tokenizer import load_encoder_tokenizer

        longest = config.max_model_len or shape.max_seq_length
        tokenizer = load_encoder_tokenizer(files, shape, longest, trust_remote_code=trusted)
        return Front(tokenizer, Grammars(tokenizer, shape.vocab_size, ()))
    if isinstance(shape, Seq2SeqConfig):
        scheme = load_scheme(files, shape, trust_remote_code=trusted)
        scheme.tokenizer.check_against(shape)
        return Front(scheme.tokenizer, Grammars(scheme.tokenizer, shape.vocab_size, shape.eos_token_ids), scheme)
    tokenizer = load_tokenizer(files, trust_remote_code=trusted)
    tokenizer.check_against(shape)
    ends = [*shape.eos_token_ids, *tokenizer.eos_token_ids]
    return Front(tokenizer, Grammars(tokenizer, shape.vocab_size, ends))


# ---------------------------------------------------------------- with torch


def start_service(
    config: EngineConfig, files: ModelFiles, shape: Shape, progress: Progress | None, wrap: Wrap = lambda core: core
) -> tuple[EngineService, Limits]:
    """A running engine. `wrap` is put around its core. Raises what is wrong with the settings or the weights."""
    import_torch()
    if isinstance(shape, EncoderConfig):
        return _start_encoder(config, files, shape, progress, wrap)
    if isinstance(shape, Seq2SeqConfig):
        return _start_seq2seq(config, files, shape, progress, wrap)
    return _start_decoder(config, files, shape, progress, wrap)


def import_torch() -> None:
    """On a thread of its own: importing it leaves frames in a cycle (`torch.fx.wrap` does), and with them everything
    that called. An `LLM` that was dropped would stay a user of its engine until the collector runs."""
    if "torch" not in sys.modules:
        with ThreadPoolExecutor(1) as apart:
            apart.submit(import_module, "torch").result()


def _start_decoder(
    config: EngineConfig, files: ModelFiles, shape: ModelConfig, progress: Progress | None, wrap: Wrap
) -> tuple[EngineService, Limits]:
    from octavo.execute.build import build_core, resolve_settings
    from octavo.execute.packing import held_weights

    resolved = resolve_settings(config, files, shape)

    def make_core() -> Core:
        nonlocal resolved
        core, resolved = build_core(config, files, shape, resolved, progress)
        return wrap(core)

    service = _started(make_core, config)
    held, dtype = held_weights(shape, resolved.packing, resolved.dtype), _name(resolved.dtype)
    return service, Limits(
        resolved.max_model_len, shape.vocab_size, str(resolved.device), dtype, resolved.num_blocks,
        resolved.block_size, resolved.max_num_seqs, resolved.packing is not None, held.name, held.bytes,
        "float8_e4m3fn" if resolved.fp8_cache else dtype,
    )  # fmt: skip


def _start_encoder(
    config: EngineConfig, files: ModelFiles, shape: EncoderConfig, progress: Progress | None, wrap: Wrap
) -> tuple[EngineService, Limits]:
    from octavo.execute.encoder import build_encoder, resolve_encoder

    resolved = resolve_encoder(config, shape)
    service = _started(lambda: wrap(build_encoder(config, files, shape, resolved, progress)), config)
    dtype = _name(resolved.dtype)
    return service, Limits(
        resolved.max_seq_length, shape.vocab_size, str(resolved.device), dtype, 0, 0, resolved.limits.texts, False,
        dtype, shape.parameters * resolved.dtype.itemsize, dtype,
    )  # fmt: skip


def _start_seq2seq(
    config: EngineConfig, files: ModelFiles, shape: Seq2SeqConfig, progress: Progress | None, wrap: Wrap
) -> tuple[EngineService, Limits]:
    from octavo.execute.packing import held_by_seq2seq
    from octavo.execute.seq2seq import build_seq2seq, resolve_seq2seq

    resolved = resolve_seq2seq(config, shape)
    service = _started(lambda: wrap(build_seq2seq(config, files, shape, resolved, progress)), config)
    dtype, held = _name(resolved.dtype), held_by_seq2seq(config, shape, resolved.dtype)
    return service, Limits(
        resolved.max_model_len, shape.vocab_size, str(resolved.device), dtype, resolved.num_blocks,
        resolved.block_size, resolved.max_num_seqs, False, held.name, held.bytes, dtype,
    )  # fmt: skip


def _started(make_core: Callable[[], Core], config: EngineConfig) -> EngineService:
    service = EngineService(make_core, max_queued_requests=config.max_queued_requests)
    service.start()
    return service


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
