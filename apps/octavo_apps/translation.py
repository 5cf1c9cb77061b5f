"""A translation as the app keeps it, sentence by sentence, and how it is made: all sentences at once in the engine's
batch, shown in their order as they come."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Self

from octavo.translation.sentences import cut, shortened

from octavo_apps.languages import Language, is_language, language
from octavo_apps.translator import Translator

AT_ONCE = 16
"""Sentences of one caller that are in the engine together: others get their turn between them."""
SECONDS_BETWEEN_SHOWS = 0.08
TITLE_LENGTH = 40
LONGEST = 600
"""Characters of a sentence; a longer one is cut at a blank, because small models lose their way in it."""


@dataclass
class Sentence:
    """One sentence. `gap` stands before it: blanks and line ends of the text, which stay as they are."""

    gap: str
    source: str
    text: str = ""


@dataclass
class Translation:
    """A text and what became of it. `source` is a code, and `detected` says that nobody named it."""

    id: str
    source: str
    target: str
    sentences: list[Sentence] = field(default_factory=list)
    tail: str = ""
    detected: bool = False
    changed: float = 0.0

    @classmethod
    def of(cls, text: str, source: str, target: str, *, detected: bool = False) -> Self:
        """Nothing is translated yet."""
        new = cls(secrets.token_hex(8), source, target, detected=detected, changed=time.time())
        for piece in cut(text, language(source).base):
            for one in shortened(piece, _short) if not _short(piece.text) else [piece]:
                new.tail += one.before
                if one.text:
                    new.sentences.append(Sentence(new.tail, one.text))
                    new.tail = ""
                new.tail += one.after
        return new

    @property
    def original(self) -> str:
        return "".join(one.gap + one.source for one in self.sentences) + self.tail

    @property
    def text(self) -> str:
        return "".join(one.gap + one.text for one in self.sentences) + self.tail

    @property
    def title(self) -> str:
        first = " ".join(self.original.split())
        return first if len(first) <= TITLE_LENGTH else first[: TITLE_LENGTH - 1].rstrip() + "…"

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises `ValueError` for what is no translation: the browser's storage is the user's to change."""
        try:
            kept: dict[str, Any] = json.loads(text)
            kept["sentences"] = [Sentence(**{k: str(v) for k, v in one.items()}) for one in kept["sentences"]]
            new = cls(**kept)
            new.changed = float(new.changed)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a translation: {error}") from error
        if not all(isinstance(value, str) for value in (new.id, new.source, new.target, new.tail)):
            raise ValueError("not a translation: its texts are none")
        if not (is_language(new.source) and is_language(new.target)):
            raise ValueError("not a translation: its languages are none")
        return new


def _short(text: str) -> bool:
    return len(text) <= LONGEST


class Run:
    """Fills in the `text` of sentences. `progress` says from time to time how many are done; closing that ends
    the requests, and so does `stop()`: then what is there stays. The first error ends the others and is
    raised."""

    def __init__(self) -> None:
        self.done, self.stopped = 0, False
        self._news = asyncio.Event()
        self._error: BaseException | None = None

    def stop(self) -> None:
        """End it soon. On the event loop."""
        self.stopped = True
        self._news.set()

    async def progress(
        self, translator: Translator, items: Sequence[Sentence], source: Language, target: Language
    ) -> AsyncGenerator[int]:
        room = asyncio.Semaphore(AT_ONCE)
        streams = [partial(translator.stream, item.source, source, target) for item in items]
        tasks = [asyncio.ensure_future(self._one(*one, room)) for one in zip(items, streams, strict=True)]
        try:
            while self.done < len(items) and not self.stopped:
                await self._news.wait()
                self._news.clear()
                if self._error is not None:
                    raise self._error
                yield self.done
                await asyncio.sleep(SECONDS_BETWEEN_SHOWS)
            yield self.done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, item: Sentence, stream: Callable[[], AsyncGenerator[str]], room: asyncio.Semaphore) -> None:
        try:
            async with room:
                item.text = ""
                async with aclosing(stream()) as pieces:
                    async for piece in pieces:
                        item.text += piece
                        self._news.set()
                item.text = " ".join(item.text.split())
            self.done += 1
        except Exception as error:
            self._error = error
        self._news.set()
