"""The models that an app uses: loaded when they are first asked for, let go of when others take their place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from octavo.async_llm import AsyncLLM
from octavo.models.cache import list_cached
from octavo.models.sources import DEFAULT_MODEL
from octavo.shared import SharedEngine

KEPT = 2
"""Models that stay loaded while nobody uses them: going back and forth between two loads nothing."""


class Engines:
    """Engines by the model's name. `settings` are those of `LLM`, the same for all. For one process and any loop."""

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        """Checks the arguments (`ConfigError`); loads nothing."""
        self.default, self._settings = model, settings
        self._engines: dict[str, SharedEngine] = {}  # the one that was used last stands at the end
        self._users: dict[str, int] = {}
        self._engines[model] = SharedEngine(model, **settings)

    def names(self) -> list[str]:
        """What can be picked without a download, the default first."""
        cached = [model.name for model in list_cached()]
        return list(dict.fromkeys([self.default, *cached]))

    def is_loaded(self, model: str) -> bool:
        engine = self._engines.get(model)
        return engine is not None and engine.started

    def started(self, model: str) -> AsyncLLM:
        """The engine of `model`, for a look at it; started if need be, which blocks."""
        return self._engines[model].async_llm

    @asynccontextmanager
    async def use(self, model: str) -> AsyncIterator[AsyncLLM]:
        """The engine of `model`, started if need be. It is not let go of before the end of the `with`."""
        engine = self._engines.pop(model, None) or SharedEngine(model, **self._settings)
        self._engines[model] = engine
        self._users[model] = self._users.get(model, 0) + 1
        try:
            llm = await engine.start()
            if llm.engine.service.closed:  # it broke: a new one takes its place
                self._engines[model] = engine = await asyncio.to_thread(self._anew, model, engine)
                llm = await engine.start()
            yield llm
        finally:
            self._users[model] -= 1
            await asyncio.to_thread(self._let_go)

    def _anew(self, model: str, broken: SharedEngine) -> SharedEngine:
        broken.close()
        return SharedEngine(model, **self._settings)

    def _let_go(self) -> None:
        idle = [name for name in self._engines if not self._users.get(name)]
        for name in idle[: max(len(self._engines) - KEPT, 0)]:
            self._engines.pop(name).close()

    def close(self) -> None:
        """End all of them."""
        while self._engines:
            self._engines.popitem()[1].close()
