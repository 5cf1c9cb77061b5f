"""The models behind the port, by the names that clients use. Loaded at start or when first asked for; when there is no
room for another, the one that was used longest ago is let go of.

`load` is the one place where an `AsyncLLM` is made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, engine_config_from
from octavo.engine.child.placement import InChild
from octavo.engine.child.service import ChildService
from octavo.errors import ConfigError, OctavoError
from octavo.models.encoder_config import EncoderConfig
from octavo.processes.guard import Guard
from octavo.processes.guarded import GuardedGrammars, Verdicts
from octavo.server.errors import ApiError, refused
from octavo.server.prompts import TextBound

Load = Callable[[EngineConfig], AsyncLLM]


def load(config: EngineConfig) -> AsyncLLM:
    """A ready engine, in a process of its own: work for HTTP does not hold its loop, and it can be replaced. Blocks."""
    return AsyncLLM.of(config, InChild())


@dataclass(frozen=True)
class Served:
    """A model as it is offered: the first of `names` is the one that answers carry."""

    config: EngineConfig
    names: tuple[str, ...]


def default_name(model: str) -> str:
    """What a model is called if nobody says: its id, but of a path only the end, as a path is nobody's business."""
    if model.startswith(("/", ".", "~")) or Path(model).exists():
        return Path(model).name or "model"
    return model


@dataclass
class Loaded:
    """A model that is ready."""

    served: Served
    llm: AsyncLLM
    bound: TextBound
    bytes: int
    """Of its weights and its cache, about."""
    guard: Guard
    _verdicts: Verdicts | None
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.served.names[0]

    @property
    def runs(self) -> bool:
        """Its engine takes requests, and is not being replaced just now."""
        service = self.llm.engine.service
        return not service.closed and not (isinstance(service, ChildService) and service.pid is None)

    @property
    def restarts(self) -> int:
        """How often its engine's process was replaced."""
        service = self.llm.engine.service
        return service.restarts if isinstance(service, ChildService) else 0

    @property
    def verdicts(self) -> Verdicts:
        """On grammars, for a model that makes text."""
        assert self._verdicts is not None
        return self._verdicts

    async def aclose(self) -> None:
        """Let go of it."""
        if self._verdicts is not None:
            self._verdicts.close()
        await self.llm.aclose()

    @property
    def embeds(self) -> bool:
        return isinstance(self.llm.engine.shape, EncoderConfig)

    def check_generates(self) -> None:
        """Raises `ApiError` for a model that makes no text."""
        if self.embeds:
            raise refused(f"{self.name} makes embeddings, no text", "model")

    def check_embeds(self) -> None:
        """Raises `ApiError` for one that makes no embeddings."""
        if not self.embeds:
            raise refused(f"{self.name} makes text, no embeddings", "model")


class Models:
    """`memory`: bytes for all models together; None lets all of them stay. For one event loop.

    `guard`: what stands between them and what clients send; one for all."""

    def __init__(self, served: Sequence[Served], *, memory: int | None = None, load: Load = load) -> None:
        """Raises `ConfigError` for two models of one name."""
        self._served: dict[str, Served] = {}
        for one in served:
            for name in one.names:
                if self._served.setdefault(name, one) is not one:
                    raise ConfigError(f"two models have the name {name!r}", "served_model_name")
        if not served:
            raise ConfigError("there is no model to serve", "model")
        self.all = tuple(served)
        self._memory, self._load = memory, load
        self.guard = Guard()
        self._loaded: dict[Served, Loaded] = {}
        self._loading: dict[Served, asyncio.Task[Loaded]] = {}
        self._created = int(time.time())
        self._changing = asyncio.Lock()

    # ---------------------------------------------------------------- what is there

    def listing(self) -> list[dict[str, object]]:
        """For `/v1/models`, every name."""
        return [self._card(name, one) for name, one in self._served.items()]

    def card(self, name: str) -> dict[str, object]:
        """Raises `ApiError` (404)."""
        return self._card(name, self._find(name))

    def _card(self, name: str, served: Served) -> dict[str, object]:
        card: dict[str, object] = {
            "id": name, "object": "model", "created": self._created, "owned_by": "octavo", "root": served.names[0],
        }  # fmt: skip
        loaded = self._loaded.get(served)
        if loaded is not None:
            card["max_model_len"] = loaded.llm.engine.limits.max_model_len
        return card

    def ready(self, wanted: Sequence[Served]) -> bool:
        """All of these are loaded, and their engines run."""
        return all(one in self._loaded and self._loaded[one].runs for one in wanted)

    def given_up(self, wanted: Sequence[Served]) -> OctavoError | None:
        """Why an engine of one of these stands still for good, if one does."""
        for one in wanted:
            service = self._loaded[one].llm.engine.service if one in self._loaded else None
            if isinstance(service, ChildService) and service.failure is not None:
                return service.failure
        return None

    @property
    def busy(self) -> bool:
        """Calls run."""
        return any(one.users for one in self._loaded.values())

    def loaded(self) -> list[Loaded]:
        return list(self._loaded.values())

    def _find(self, name: str | None) -> Served:
        if name is None:
            return self.all[0]
        served = self._served.get(name)
        if served is None:
            raise ApiError(404, f"there is no model {name[:100]!r} here", param="model", code="model_not_found")
        return served

    # ---------------------------------------------------------------- using one

    @asynccontextmanager
    async def use(self, name: str | None, *, embeds: bool = False) -> AsyncIterator[Loaded]:
        """The model of this name, loaded if need be; it stays until the end of the `with`. None: the first one, or the
        first that is known to make embeddings.

        Raises:
            ApiError: 404, or 503 if it cannot be loaded now.
        """
        if name is None and embeds:
            name = next((one.name for one in self._loaded.values() if one.embeds), None)
        loaded = await self.get(self._find(name))
        loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1
            loaded.last_used = time.monotonic()

    async def get(self, served: Served) -> Loaded:
        """Loaded if need be. Callers that want one model wait for one start."""
        found = self._loaded.get(served)
        if found is not None and not found.llm.engine.service.closed:
            return found
        task = self._loading.get(served)
        if task is None:
            task = self._loading[served] = asyncio.create_task(self._start(served))
            task.add_done_callback(lambda _: self._loading.pop(served, None))
        return await asyncio.shield(task)

    async def _start(self, served: Served) -> Loaded:
        async with self._changing:  # one after the other: memory is counted between two
            broken = self._loaded.pop(served, None)
            if broken is not None:
                await broken.aclose()
            await self._make_room()
            llm = await asyncio.to_thread(self._load, served.config)
            bound = await asyncio.to_thread(TextBound, llm.tokenizer, llm.engine.limits.max_model_len)
            verdicts = await asyncio.to_thread(_verdicts, self.guard, llm)
            if verdicts is not None:  # the engine's process compiles by itself what is approved
                llm.compile_by(GuardedGrammars(verdicts))
            loaded = self._loaded[served] = Loaded(served, llm, bound, _bytes(llm), self.guard, verdicts)
            await self._make_room(keep=loaded)
            return loaded

    async def _make_room(self, keep: Loaded | None = None) -> None:
        """Let go of idle models, the one used longest ago first, until the rest fits."""
        if self._memory is None:
            return
        while sum(one.bytes for one in self._loaded.values()) > self._memory:
            idle = [one for one in self._loaded.values() if not one.users and one is not keep]
            if not idle:
                return
            oldest = min(idle, key=lambda one: one.last_used)
            del self._loaded[oldest.served]
            await oldest.aclose()

    async def close(self) -> None:
        """End all of them."""
        for task in list(self._loading.values()):
            task.cancel()
        loaded, self._loaded = list(self._loaded.values()), {}
        for one in loaded:
            await one.aclose()
        await asyncio.to_thread(self.guard.close)


def _verdicts(guard: Guard, llm: AsyncLLM) -> Verdicts | None:
    """The guard is told of the model at once: its first grammar need not wait."""
    shape = llm.engine.shape
    if isinstance(shape, EncoderConfig):
        return None
    ends = (*shape.eos_token_ids, *llm.tokenizer.eos_token_ids)
    return Verdicts(guard, llm.tokenizer, llm.engine.limits.vocab_size, ends)


def _bytes(llm: AsyncLLM) -> int:
    limits = llm.engine.limits
    shape = llm.engine.shape
    if isinstance(shape, EncoderConfig):
        return limits.weight_bytes
    size = 1 if limits.kv_cache_dtype.startswith("float8") else 4 if limits.kv_cache_dtype == "float32" else 2
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size
    return limits.weight_bytes + limits.num_blocks * limits.block_size * per_token


def served_models(models: Sequence[str], names: Sequence[str], settings: Mapping[str, Any]) -> list[Served]:
    """From what a command line says: `names` has the names of each model in turn, with commas between them. `settings`
    are those of an engine, the same for all. Raises `ConfigError`."""
    if len(names) > len(models):
        raise ConfigError(f"{len(names)} served names for {len(models)} models", "served_model_name")
    found = []
    for place, model in enumerate(models):
        given = names[place] if place < len(names) else default_name(model)
        called = tuple(name.strip() for name in given.split(",") if name.strip())
        if not called:
            raise ConfigError(f"a served name of {model} is empty", "served_model_name")
        found.append(Served(engine_config_from(model, dict(settings)), called))
    return found
