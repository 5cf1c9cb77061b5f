"""One engine per configuration in a process. `acquire` starts it or joins it, `Engine.release` gives it back; the last
one closes.

Ten chains that name the same model share one engine, one KV cache and one batch.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module

from octavo.config import EngineConfig
from octavo.decode.grammar import Grammars
from octavo.engine.core import EngineCore
from octavo.engine.service import EngineService
from octavo.errors import RequestError
from octavo.host_memory import collector_paused, memory_goes_back
from octavo.models.config import load_config
from octavo.models.encoder_config import EncoderConfig, is_encoder, load_encoder_config
from octavo.models.seq2seq_config import DecoderConfig, is_seq2seq, load_seq2seq_config
from octavo.models.sources import EMBEDDING_MODEL, ModelFiles, Progress, resolve
from octavo.tokenizer import Tokenizer, load_tokenizer
from octavo.translation.scheme import Scheme, load_scheme


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


@dataclass(slots=True)
class Engine:
    """A running engine and what its callers need to talk to it."""

    config: EngineConfig
    files: ModelFiles
    shape: DecoderConfig | EncoderConfig
    tokenizer: Tokenizer
    service: EngineService
    limits: Limits
    grammars: Grammars
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

    def release(self) -> bool:
        """One user less; the last one closes the engine. True for that one: it should let go of the engine and then
        call `give_back_memory`."""
        with _lock:
            self.users -= 1
            last = self.users <= 0
            if last and _engines.get(self.config) is self:
                del _engines[self.config]
        if last:
            self.service.close()
        return last


_engines: dict[EngineConfig, Engine] = {}
_lock = threading.RLock()
_starting: dict[EngineConfig, threading.Lock] = {}


def _start_anew() -> None:
    """In a forked child: the parent's engines do not run here, and its locks may be held by threads that are gone."""
    global _lock
    _lock = threading.RLock()
    _engines.clear()
    _starting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def acquire(config: EngineConfig, progress: Progress | None = None) -> Engine:
    """The engine of this configuration, started if there is none. Callers of one configuration wait for the same
    start."""
    with _lock:
        start = _starting.setdefault(config, threading.Lock())
    with start:
        with _lock:
            engine = _engines.get(config)
            if engine is not None and not engine.service.closed:
                engine.users += 1
                return engine
        with collector_paused(), memory_goes_back():
            engine = _start(config, progress)
        with _lock:
            engine.users = 1
            _engines[config] = engine
        return engine


def _import_torch() -> None:
    """On a thread of its own: importing it leaves frames in a cycle (`torch.fx.wrap` does), and with them everything
    that called. An `LLM` that was dropped would stay a user of its engine until the collector runs."""
    if "torch" not in sys.modules:
        with ThreadPoolExecutor(1) as apart:
            apart.submit(import_module, "torch").result()


def _start(config: EngineConfig, progress: Progress | None) -> Engine:
    began = time.monotonic()
    files = resolve(
        config.model, revision=config.revision, token=config.token, progress=progress,
        need_weights=config.load_format != "dummy", allow_pickle=config.allow_pickle,
    )  # fmt: skip
    if is_encoder(files):
        return _start_encoder(config, files, progress, began)
    if is_seq2seq(files):
        return _start_seq2seq(config, files, progress, began)
    model_config = load_config(files)
    with ThreadPoolExecutor(1) as background:  # the tokenizer loads while torch is imported and the weights are read
        tokenizer = background.submit(load_tokenizer, files, trust_remote_code=config.trust_remote_code)
        _import_torch()
        from octavo.execute.build import build_core, resolve_settings
        from octavo.execute.packing import held_weights

        resolved = resolve_settings(config, files, model_config)

        def make_core() -> EngineCore:
            nonlocal resolved
            core, resolved = build_core(config, files, model_config, resolved, progress)
            return core

        service = EngineService(make_core, max_queued_requests=config.max_queued_requests)
        checked = background.submit(lambda: tokenizer.result().check_against(model_config))
        service.start()
        try:
            checked.result()
        except BaseException:
            service.close()
            raise
    held = held_weights(model_config, resolved.packing, resolved.dtype)
    limits = Limits(
        resolved.max_model_len, model_config.vocab_size, str(resolved.device),
        str(resolved.dtype).removeprefix("torch."), resolved.num_blocks, resolved.block_size,
        resolved.max_num_seqs, resolved.packing is not None, held.name, held.bytes,
        "float8_e4m3fn" if resolved.fp8_cache else str(resolved.dtype).removeprefix("torch."),
    )  # fmt: skip
    ends = [*model_config.eos_token_ids, *tokenizer.result().eos_token_ids]
    grammars = Grammars(tokenizer.result(), model_config.vocab_size, ends)
    return Engine(config, files, model_config, tokenizer.result(), service, limits, grammars, time.monotonic() - began)


def _start_encoder(config: EngineConfig, files: ModelFiles, progress: Progress | None, began: float) -> Engine:
    _import_torch()
    from octavo.execute.encoder import build_encoder, resolve_encoder
    from octavo.models.encoder_tokenizer import load_encoder_tokenizer

    shape = load_encoder_config(files)
    resolved = resolve_encoder(config, shape)
    trusted = config.trust_remote_code
    tokenizer = load_encoder_tokenizer(files, shape, resolved.max_seq_length, trust_remote_code=trusted)
    service = EngineService(
        lambda: build_encoder(config, files, shape, resolved, progress), max_queued_requests=config.max_queued_requests
    )
    service.start()
    dtype = str(resolved.dtype).removeprefix("torch.")
    limits = Limits(
        resolved.max_seq_length, shape.vocab_size, str(resolved.device), dtype, 0, 0, resolved.limits.texts, False,
        dtype, shape.parameters * resolved.dtype.itemsize, dtype,
    )  # fmt: skip
    grammars = Grammars(tokenizer, shape.vocab_size, ())
    return Engine(config, files, shape, tokenizer, service, limits, grammars, time.monotonic() - began)


def _start_seq2seq(config: EngineConfig, files: ModelFiles, progress: Progress | None, began: float) -> Engine:
    shape = load_seq2seq_config(files)
    _import_torch()
    from octavo.execute.packing import held_by_seq2seq
    from octavo.execute.seq2seq import build_seq2seq, resolve_seq2seq

    resolved = resolve_seq2seq(config, shape)
    scheme = load_scheme(files, shape, trust_remote_code=config.trust_remote_code)
    scheme.tokenizer.check_against(shape)
    service = EngineService(
        lambda: build_seq2seq(config, files, shape, resolved, progress), max_queued_requests=config.max_queued_requests
    )
    service.start()
    dtype, held = str(resolved.dtype).removeprefix("torch."), held_by_seq2seq(config, shape, resolved.dtype)
    limits = Limits(
        resolved.max_model_len, shape.vocab_size, str(resolved.device), dtype, resolved.num_blocks,
        resolved.block_size, resolved.max_num_seqs, False, held.name, held.bytes, dtype,
    )  # fmt: skip
    grammars = Grammars(scheme.tokenizer, shape.vocab_size, shape.eos_token_ids)
    seconds = time.monotonic() - began
    return Engine(config, files, shape, scheme.tokenizer, service, limits, grammars, seconds, scheme)


@atexit.register
def _close_all() -> None:
    """At exit, end the threads in order: a thread that runs torch while the interpreter goes away can crash it."""
    for engine in list(_engines.values()):
        engine.service.close()
