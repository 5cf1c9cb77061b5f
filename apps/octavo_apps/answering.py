"""One answer of the chat app: from a conversation to its next turn, piece by piece, and the figures on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from octavo.async_llm import AsyncLLM, AsyncTokenStream
from octavo.chat import Delta, ReasoningDelta, TextDelta, plan_chat
from octavo.chat.plan import ChatPlan
from octavo.engine.contract import EngineStats
from octavo.errors import RequestError
from octavo.outputs import RequestMetrics
from octavo.sampling_params import SamplingParams

from octavo_apps.conversation import Conversation, Turn

ROOM_SHARE = 4
"""One part in four of the model's length is kept for the answer: older turns make way for it."""
CHARACTERS_PER_TOKEN = 16
"""A message with more characters for each token of the model's length is refused without being read: it cannot fit."""
SECONDS_BETWEEN_SHOWS = 0.1
"""The page is told that often. Where browser and model share two cores, each time costs tokens: of 220
a second, about 110 were left at 0.06 s, 140 at 0.12."""
SECONDS_BETWEEN_STATS = 0.25


@dataclass(frozen=True)
class Moment:
    """What can be shown now. `stats` is the engine's state, None before it was first asked."""

    metrics: RequestMetrics
    stats: EngineStats | None
    most_running: int
    """The most sequences that were seen to share its steps."""


class Answer:
    """The next turn of a conversation. `run` makes it, and closing that ends the request; `stop()` ends it early, and
    what was written stays."""

    def __init__(self, conversation: Conversation, params: SamplingParams) -> None:
        self.turn = Turn("assistant", complete=False)
        self.forgotten = 0  # turns that no longer fit
        self._most_running = 0
        self._conversation, self._params = conversation, params
        self._stream: AsyncTokenStream | None = None
        self._stats: EngineStats | None = None
        self._stopped = False

    def stop(self) -> None:
        """End it soon. On the event loop."""
        self._stopped = True
        if self._stream is not None:
            self._stream.close()

    async def run(self, llm: AsyncLLM) -> AsyncGenerator[Moment]:
        """Appends the turn to the conversation, unless the request is refused, and fills it. Raises `OctavoError`."""
        check_length(llm, self._conversation.turns[-1].content)
        plan = await asyncio.to_thread(self._fitting, llm)
        parser = plan.parser()
        stream = self._stream = await llm.begin(plan.prompt, plan.params)
        self._conversation.turns.append(self.turn)
        shown = asked = 0.0
        reason = None
        try:
            if self._stopped:  # before there was a stream
                stream.close()
            async for piece in stream:
                self._take(parser.push(piece.text))
                reason = piece.finish_reason or reason
                now = time.monotonic()
                if now - shown < SECONDS_BETWEEN_SHOWS:
                    continue
                if now - asked >= SECONDS_BETWEEN_STATS:
                    await self._ask(llm)
                    asked = now
                shown = now
                yield self._moment(stream)
            self._take(parser.finish())
            self._end(reason)
            await self._ask(llm)
            yield self._moment(stream)
        finally:
            stream.close()
            self.turn.complete = True

    def _end(self, reason: str | None) -> None:
        self.turn.complete = True
        if self._stopped:
            self.turn.note = "Stopped."
        elif reason == "length":
            self.turn.note = "The answer reached its longest length: raise it in the settings, or ask to go on."
        elif not self.turn.content:
            self.turn.note = "The model gave an empty answer: ask again, or in other words."

    def _take(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, TextDelta):
                self.turn.content += delta.text
            elif isinstance(delta, ReasoningDelta):
                self.turn.thinking += delta.text

    async def _ask(self, llm: AsyncLLM) -> None:
        self._stats = await asyncio.to_thread(llm.stats)  # it waits for the current step
        self._most_running = max(self._most_running, self._stats.running)

    def _moment(self, stream: AsyncTokenStream) -> Moment:
        return Moment(stream.output.metrics, self._stats, self._most_running)

    def _fitting(self, llm: AsyncLLM) -> ChatPlan:
        """The plan for as many of the last turns as leave room for an answer; the last question is always among
        them."""
        limit = llm.engine.limits.max_model_len
        room = min(self._params.max_tokens or limit, limit // ROOM_SHARE)
        messages = self._conversation.messages()
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        while True:
            plan = plan_chat(llm.tokenizer, [*system, *turns], self._params)
            if len(turns) <= 2 or len(plan.prompt["prompt_token_ids"]) <= limit - room:
                return plan
            del turns[:2]
            self.forgotten += 2


def check_length(llm: AsyncLLM, text: str) -> None:
    """Raises `RequestError` for a message that cannot fit, without reading it."""
    limit = llm.engine.limits.max_model_len
    if len(text) > limit * CHARACTERS_PER_TOKEN:
        raise RequestError(
            f"This message has {len(text):,} characters, but the model holds {limit:,} tokens (about {4 * limit:,} "
            "characters): send a shorter one.", "messages",
        )  # fmt: skip
