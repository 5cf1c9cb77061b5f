"""From texts to checked requests for an embedding engine, and from its events to outputs. Called by `LLM.embed` and
`AsyncLLM.embed`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

from octavo.engine.embed_request import EmbedEvent, EmbedRequest
from octavo.engine.start import Engine
from octavo.errors import EngineClosedError, RequestError
from octavo.models.encoder_config import EncoderConfig
from octavo.outputs import EmbeddingOutput
from octavo.texts import checked_texts
from octavo.tokenizer import encoded

GROUP = 32
"""Texts that are tokenised at once. The engine works on them while the next are tokenised, and an event loop gets its
turn."""

_numbers = itertools.count(1)


def embed_requests(
    engine: Engine, texts: Sequence[str] | str, prompt_name: str | None, sink: Callable[[int, EmbedEvent], None]
) -> Iterator[list[EmbedRequest]]:
    """One request for each text, in order, made in groups as they are asked for; nothing is submitted. `sink` receives
    the text's place and its event.

    A text that is too long is cut to the model's length, as sentence-transformers does it. Raises `RequestError` that
    names the first bad text, or the prompt, before the first group."""
    prompt = _prompt(engine.encoder, prompt_name)
    return _groups(engine, prompt, checked_texts(texts), sink)


def _groups(
    engine: Engine, prompt: str, texts: list[str], sink: Callable[[int, EmbedEvent], None]
) -> Iterator[list[EmbedRequest]]:
    places = iter(enumerate(texts))
    while group := list(islice(places, GROUP)):
        yield [_request(engine, prompt + text, place, sink) for place, text in group]


def _request(engine: Engine, text: str, place: int, sink: Callable[[int, EmbedEvent], None]) -> EmbedRequest:
    backend = engine.tokenizer.backend
    found = encoded(backend, text, False)
    room = engine.limits.max_model_len - backend.num_special_tokens_to_add(False)
    truncated = len(found.ids) > room
    found.truncate(room)
    ids = backend.post_process(found).ids
    if not ids:  # a tokenizer that puts nothing around a text
        raise RequestError(f"text {place} has no token", "texts")
    return EmbedRequest(f"octavo-embed-{next(_numbers)}", ids, partial(sink, place), truncated=truncated)


def _prompt(shape: EncoderConfig, name: str | None) -> str:
    if name is None:
        return shape.default_prompt
    if name not in shape.prompts:
        known = ", ".join(map(repr, shape.prompts)) or "none"
        raise RequestError(f"the model has no prompt {name!r}; its prompts: {known}", "prompt_name")
    prompt = shape.prompts[name]
    if prompt and not shape.pools_prompt:
        message = "this model leaves prompts out of its pooling, which is not implemented: leave prompt_name out"
        raise RequestError(message, "prompt_name")
    return prompt


def output_of(request: EmbedRequest, event: EmbedEvent) -> EmbeddingOutput | BaseException:
    """What a caller gets for a text."""
    if event.error is not None:
        return event.error
    if event.vector is None:
        return EngineClosedError("the text was aborted")
    return EmbeddingOutput(event.vector.tolist(), request.prompt_ids, request.truncated, request.metrics)
