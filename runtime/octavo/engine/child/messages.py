"""What the server's process and the engine's process say to each other: msgpack, by msgspec. No pickle: see
`octavo.processes`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from octavo import errors
from octavo.config import EngineConfig
from octavo.engine.contract import EngineStats
from octavo.engine.request import Made, RawLogprobs
from octavo.engine.start import Limits
from octavo.errors import EngineClosedError, OctavoError
from octavo.models.sources import ModelFiles
from octavo.sampling_params import SamplingParams

# ---------------------------------------------------------------- to the engine


class Files(msgspec.Struct):
    """`ModelFiles`."""

    name: str
    path: str
    format: Literal["safetensors", "gguf"]
    source: str
    allow_pickle: bool

    @classmethod
    def of(cls, files: ModelFiles) -> Files:
        return cls(files.name, str(files.path), files.format, files.source, files.allow_pickle)

    def files(self) -> ModelFiles:
        return ModelFiles(self.name, Path(self.path), self.format, self.source, self.allow_pickle)


class Start(msgspec.Struct, tag=True):
    """Be this engine. The first message, and the only one of its kind."""

    config: EngineConfig
    files: Files


class Generate(msgspec.Struct, tag=True):
    """A request for text. `arrival`: by the clock that all processes of a machine share. `made`: of each output, where
    the request goes on."""

    number: int
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    eos_token_ids: list[int]
    bad_word_ids: list[list[int]]
    seed: int
    priority: int
    cache_salt: str
    source_ids: list[int] | None
    length_offset: int
    arrival: float
    made: list[Made] | None


class Embed(msgspec.Struct, tag=True):
    """A text to embed."""

    number: int
    prompt_ids: list[int]
    arrival: float


class Abort(msgspec.Struct, tag=True):
    number: int
    index: int | None


class Ask(msgspec.Struct, tag=True):
    """For the `EngineStats`."""

    ticket: int


ToEngine = Start | Generate | Embed | Abort | Ask

# ---------------------------------------------------------------- from the engine


class Problem(msgspec.Struct):
    """An error."""

    kind: str
    message: str
    field: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        return cls(type(error).__name__, str(error), getattr(error, "field", None))

    def error(self) -> OctavoError:
        """One of ours as it was; any other as an `EngineClosedError` that names it."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, OctavoError)):
            return EngineClosedError(f"{self.kind}: {self.message}")
        found: OctavoError = kind.__new__(kind)  # the constructors differ, and the message is complete
        Exception.__init__(found, self.message)
        if self.field is not None:
            found.field = self.field  # type: ignore[attr-defined]
        return found


class Beam(msgspec.Struct, array_like=True):
    """What an output that ends a search has besides."""

    cumulative_logprob: float
    score: float


class Event(msgspec.Struct, array_like=True, omit_defaults=True):
    """A `TokenEvent`, or an `EmbedEvent`, of the request with this number."""

    number: int
    index: int = 0
    token_ids: list[int] = []
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[RawLogprobs] | None = None
    prompt_logprobs: list[RawLogprobs] | None = None
    error: Problem | None = None
    beam: Beam | None = None
    preemptions: int = 0
    vector: list[float] | None = None


class Started(msgspec.Struct, array_like=True):
    """A request had its first step planned, after so many seconds."""

    number: int
    queue_time: float
    cached_tokens: int


class Step(msgspec.Struct, tag=True):
    """What happened since the last message of this kind."""

    started: list[Started]
    events: list[Event]


class Ready(msgspec.Struct, tag=True):
    """The engine runs."""

    limits: Limits


class Failed(msgspec.Struct, tag=True):
    """It could not start."""

    problem: Problem


class Loading(msgspec.Struct, tag=True):
    """Of a `Progress`."""

    label: str
    done: int
    total: int | None


class Beat(msgspec.Struct, tag=True):
    """The process is alive, and its engine is in one and the same step for so many seconds."""

    step_seconds: float


class Answer(msgspec.Struct, tag=True):
    ticket: int
    stats: EngineStats


FromEngine = Step | Ready | Failed | Loading | Beat | Answer

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
