"""`batch` and its relatives with every input in flight at once. Both classes inherit `AllAtOnce`.

Each input keeps its own run: callbacks, cache, rate limit, errors. In synchronous code a thread waits for each of them,
because callbacks of one input may block; the tokens of all come from one batch of the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextvars import Context, copy_context
from functools import partial
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor, get_config_list

from langchain_octavo.calls import UnderWay, under_way

MOST_THREADS = 512
"""Twice what an engine runs at once on a GPU by default: more threads would only wait."""

Configs = RunnableConfig | Sequence[RunnableConfig] | None


class AllAtOnce(Runnable[Any, Any]):
    """Overrides of `Runnable`, over `invoke` and `ainvoke`."""

    def batch(
        self, inputs: list[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Run all inputs in one batch of the engine; at most `max_concurrency` of the first config at a time, if given.

        With `return_exceptions`, an input's error stands in its place; else the first is raised when all have ended.
        """
        found: dict[int, Any] = {}
        for future, place in _in_threads(self, inputs, config, kwargs):
            found[place] = future.exception() or future.result()
        outputs = [found[place] for place in range(len(inputs))]
        for output in outputs:
            if isinstance(output, BaseException) and not (return_exceptions and isinstance(output, Exception)):
                raise output
        return outputs

    def batch_as_completed(
        self, inputs: Sequence[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> Iterator[Any]:
        """Yield (place, output) in the order in which answers are complete. Leaving early ends the others."""
        for future, place in _in_threads(self, inputs, config, kwargs):
            error = future.exception()
            if error is not None and not (return_exceptions and isinstance(error, Exception)):
                raise error
            yield place, error or future.result()

    async def abatch(
        self, inputs: list[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """`batch` for asyncio, without threads."""
        return await Runnable.abatch(self, inputs, config, return_exceptions=return_exceptions, **kwargs)  # type: ignore[arg-type]

    async def abatch_as_completed(
        self, inputs: Sequence[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """`batch_as_completed` for asyncio."""
        if not inputs:
            return
        configs = get_config_list(config, len(inputs))
        room = asyncio.Semaphore(configs[0].get("max_concurrency") or len(inputs))

        async def answer(one: Any, its: RunnableConfig) -> Any:
            async with room:
                return await self.ainvoke(one, its, **kwargs)

        tasks = {
            asyncio.create_task(answer(one, its)): place
            for place, (one, its) in enumerate(zip(inputs, configs, strict=True))
        }
        try:
            waiting = set(tasks)
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is not None and not (return_exceptions and isinstance(error, Exception)):
                        raise error
                    yield tasks[task], error or task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _in_threads(
    runnable: Runnable[Any, Any], inputs: Sequence[Any], config: Configs, kwargs: dict[str, Any]
) -> Iterator[tuple[Future[Any], int]]:
    """Invoke each input in a thread of its own, and yield its future and its place when it has ended. Leaving early, by
    an interrupt too, ends the requests that still run and those that have not begun."""
    if not inputs:
        return
    configs = get_config_list(config, len(inputs))
    workers = configs[0].get("max_concurrency") or min(len(inputs), MOST_THREADS)
    group = UnderWay()
    inside = copy_context()
    inside.run(under_way.set, group)
    places: dict[Future[Any], int] = {}
    pool = ContextThreadPoolExecutor(workers)
    try:
        for place, (one, its) in enumerate(zip(inputs, configs, strict=True)):
            places[_submit(inside, pool, partial(runnable.invoke, one, its, **kwargs))] = place
        waiting = set(places)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future, places[future]
    finally:
        for future in places:
            future.cancel()
        if not all(future.done() for future in places):
            group.close()
        pool.shutdown()


def _submit(inside: Context, pool: ContextThreadPoolExecutor, call: Any) -> Future[Any]:
    future: Future[Any] = inside.run(pool.submit, call)  # the pool copies the context that it is called in
    return future


def generate_all(generate_one: Any, many: Sequence[Any]) -> list[Any]:
    """`generate_one(item, first)` for each item at once, in threads; results in order. The first error is raised when
    all have ended."""
    if len(many) == 1:
        return [generate_one(many[0], True)]
    with ContextThreadPoolExecutor(min(len(many), MOST_THREADS)) as pool:
        futures = [pool.submit(generate_one, item, place == 0) for place, item in enumerate(many)]
    return [future.result() for future in futures]
