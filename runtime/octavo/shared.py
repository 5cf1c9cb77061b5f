"""`SharedEngine`: the engine behind an object that should cost nothing until it is used. The LangChain and LlamaIndex
classes hold one each.

All `SharedEngine`s of one configuration share one engine: the first that is used starts it, and it ends when the last
of them is closed or collected, used or not. So a chain may make and drop objects with other sampling settings as it
likes, and the model stays where it is.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any, Self

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, engine_config_from
from octavo.errors import EngineClosedError
from octavo.llm import LLM
from octavo.models.sources import DEFAULT_MODEL


class _Slot:
    """The clients of one configuration, and how many `SharedEngine`s hold them."""

    def __init__(self) -> None:
        self.holders = 0
        self.closed = False
        self.starting = threading.Lock()
        self.llm: LLM | None = None
        self.async_llm: AsyncLLM | None = None

    def close(self) -> None:
        with self.starting:  # a start under way ends first, or nobody would close what it makes
            clients = (self.llm, self.async_llm)
            self.llm = self.async_llm = None
        for client in clients:
            if client is not None:
                client.close()


_slots: dict[EngineConfig, _Slot] = {}
_lock = threading.RLock()


def _start_anew() -> None:
    """In a forked child the parent's engines do not run, and its locks may be held by threads that are gone."""
    global _lock
    _lock = threading.RLock()
    _slots.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


class SharedEngine:
    """One user of an engine that is started when it is first needed.

    Arguments are those of `LLM`; they are checked here (`ConfigError`), but nothing is loaded. The properties start the
    engine and raise what `LLM` raises. Any thread may use it.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        self._slot: _Slot | None = None  # so that close() works when the next line raises
        self._hold(engine_config_from(model, settings))

    @classmethod
    def of(cls, config: EngineConfig) -> Self:
        """One more user of the engine of `config`."""
        new = cls.__new__(cls)
        new._slot = None
        new._hold(config)
        return new

    def _hold(self, config: EngineConfig) -> None:
        self.config = config
        with _lock:
            while True:
                slot = _slots.setdefault(config, _Slot())
                slot.holders += 1
                if not slot.closed:  # it can be, if the collector ran between the two lines
                    break
                _slots.pop(config, None)
            self._slot = slot

    def _open_slot(self) -> _Slot:
        if self._slot is None:
            raise EngineClosedError("it was closed: make a new one")
        return self._slot

    @property
    def started(self) -> bool:
        """Whether the engine runs already, for this or another user."""
        slot = self._slot
        return slot is not None and (slot.llm is not None or slot.async_llm is not None)

    @property
    def closed(self) -> bool:
        return self._slot is None

    @property
    def llm(self) -> LLM:
        """The engine for synchronous code. The first use waits until the model is loaded."""
        slot = self._open_slot()
        if slot.llm is None:
            with slot.starting:
                if slot.llm is None:
                    slot.llm = LLM.of(self.config)
        return slot.llm

    @property
    def async_llm(self) -> AsyncLLM:
        """The engine for asyncio code. The first use blocks until the model is loaded; `await start()` does not."""
        slot = self._open_slot()
        if slot.async_llm is None:
            with slot.starting:
                if slot.async_llm is None:
                    slot.async_llm = AsyncLLM.of(self.config)
        return slot.async_llm

    async def start(self) -> AsyncLLM:
        """`async_llm`, without blocking the event loop while a model is loaded."""
        slot = self._open_slot()
        if slot.async_llm is None:
            return await asyncio.to_thread(lambda: self.async_llm)
        return slot.async_llm

    def close(self) -> None:
        """Let go of the engine. The last user's `close` ends its requests and gives back its memory. Safe to call
        twice."""
        slot, self._slot = self._slot, None
        if slot is None:
            return
        with _lock:
            slot.holders -= 1
            last = slot.holders == 0
            if last:
                slot.closed = True
                if _slots.get(self.config) is slot:
                    del _slots[self.config]
        if last:
            slot.close()

    def __del__(self) -> None:
        if getattr(self, "_slot", None) is not None:
            self.close()

    def __reduce__(self) -> tuple[Any, tuple[EngineConfig]]:
        """A copy is one more user."""
        return type(self).of, (self.config,)
