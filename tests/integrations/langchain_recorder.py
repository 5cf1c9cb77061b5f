"""What the LangChain tests share: a callback handler that writes down what it hears, and looks at the engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from octavo.engine.service import EngineStats


class Recorder(BaseCallbackHandler):
    """Counts events, and keeps tokens and ends by run."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.tokens: dict[UUID, list[Any]] = {}
        self.ends: dict[UUID, Any] = {}
        self.errors: list[str] = []
        self.events: list[dict[str, Any]] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.counts["start"] += 1
        self.tokens[run_id] = []

    def on_llm_start(self, serialized: Any, prompts: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.counts["start"] += 1
        self.tokens[run_id] = []

    def on_llm_new_token(self, token: Any, *, run_id: UUID, chunk: Any = None, **kwargs: Any) -> None:
        assert chunk is not None
        self.counts["token"] += 1
        self.tokens[run_id].append(token)

    def on_llm_end(self, response: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.counts["end"] += 1
        self.ends[run_id] = response

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.counts["error"] += 1
        self.errors.append(type(error).__name__)

    def on_stream_event(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)


class AsyncRecorder(AsyncCallbackHandler):
    """The same, awaited."""

    def __init__(self) -> None:
        self.inner = Recorder()

    async def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.inner.on_chat_model_start(*args, **kwargs)

    async def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        self.inner.on_llm_start(*args, **kwargs)

    async def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        self.inner.on_llm_new_token(*args, **kwargs)

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.inner.on_llm_end(*args, **kwargs)


def at_rest(stats: EngineStats) -> bool:
    """Nothing runs, nothing waits, no block is held."""
    return (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
