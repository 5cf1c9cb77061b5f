"""From texts to checked requests for an embedding engine, and from its events to outputs. Called by `LLM.embed` and
`AsyncLLM.embed`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from octavo.engine.embed_request import EmbedEvent, EmbedRequest
from octavo.engine.registry import Engine
from octavo.errors import EngineClosedError, RequestError
from octavo.outputs import EmbeddingOutput

_numbers = itertools.count(1)


def embed_requests(
    engine: Engine, texts: Sequence[str] | str, prompt_name: str | None, sink: Callable[[int, EmbedEvent], None]
) -> list[EmbedRequest]:
    """One request for each text; nothing is submitted. `sink` receives the text's place and its event.

    A text that is too long is cut to the model's length, as sentence-transformers does it. Raises `RequestError` that
    names the first bad text, or the prompt."""
    shape = engine.encoder
    prompt = shape.default_prompt
    if prompt_name is not None:
        if prompt_name not in shape.prompts:
            known = ", ".join(map(repr, shape.prompts)) or "none"
            raise RequestError(f"the model has no prompt {prompt_name!r}; its prompts: {known}", "prompt_name")
        prompt = shape.prompts[prompt_name]
    batch: object = [texts] if isinstance(texts, str) else texts
    if isinstance(batch, bytes) or not isinstance(batch, Sequence):
        raise RequestError(f"texts must be a string or a list of strings, not {type(texts).__name__}", "texts")
    requests = []
    for place, text in enumerate(batch):
        if not isinstance(text, str):
            raise RequestError(f"text {place} is a {type(text).__name__}, not a string", "texts")
        ids, truncated = _tokens(engine, prompt + text, place)
        requests.append(
            EmbedRequest(f"octavo-embed-{next(_numbers)}", ids, partial(sink, place), truncated=truncated)
        )
    return requests


def _tokens(engine: Engine, text: str, place: int) -> tuple[list[int], bool]:
    text = text.strip()
    backend, longest = engine.tokenizer.backend, engine.limits.max_model_len
    try:
        found = backend.encode(text.lower() if engine.encoder.lower_case else text, add_special_tokens=False)
    except (TypeError, UnicodeError) as error:
        raise RequestError(f"text {place} has surrogates, which are no text", "texts") from error
    room = longest - backend.num_special_tokens_to_add(False)
    truncated = len(found.ids) > room
    found.truncate(room)
    return list(backend.post_process(found).ids), truncated


def output_of(request: EmbedRequest, event: EmbedEvent) -> EmbeddingOutput | BaseException:
    """What a caller gets for a text."""
    if event.error is not None:
        return event.error
    if event.vector is None:
        return EngineClosedError("the text was aborted")
    return EmbeddingOutput(event.vector.tolist(), request.prompt_ids, request.truncated, request.metrics)
