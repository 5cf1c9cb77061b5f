"""`/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from array import array
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import RequestError
from octavo.outputs import EmbeddingOutput
from octavo.server.call import Call
from octavo.server.errors import refused
from octavo.server.protocol.embeddings import EmbeddingRequest
from octavo.server.streams import ClientGone, while_connected

GROUP = 32
"""Vectors that are written as JSON at once: two milliseconds."""


async def embeddings(request: Request) -> Response:
    """OpenAI's embeddings, of texts."""
    call = Call(request)
    body = await call.body(EmbeddingRequest)
    try:
        found: Response = await while_connected(request, _embed(call, body))
    except ClientGone:
        return Response(status_code=499)
    return found


async def _embed(call: Call, body: EmbeddingRequest) -> Response:
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not all(isinstance(text, str) for text in texts):
        message = "input must be text: token ids would be those of another model (LangChain: check_embedding_ctx_length"
        raise refused(f"{message}=False)", "input")
    async with call.server.models.use(body.model, embeds=True) as loaded:
        loaded.check_embeds()
        size = loaded.llm.engine.encoder.dimension
        if body.dimensions not in (None, size):
            raise refused(f"this model's embeddings have {size} dimensions, no others", "dimensions")
        watch = call.server.observer.begin("embeddings", loaded.name, call.id, call.request.headers)
        try:
            outputs = await loaded.llm.embed(texts, prompt_name=body.prompt_name, wait=False)  # type: ignore[arg-type]
        except RequestError as error:
            watch.error(error)
            raise RequestError(str(error), "input" if error.field == "texts" else error.field) from error
        except BaseException as error:
            watch.error(error)
            raise
        watch.end([output.metrics for output in outputs], ["stop"] * len(outputs))
    return await _response(body.model or loaded.name, outputs, body.encoding_format == "base64")


async def _response(model: str, outputs: list[EmbeddingOutput], packed: bool) -> Response:
    """Written group by group: other streams have their turn between two."""
    parts = []
    for start in range(0, len(outputs), GROUP):
        for place, output in enumerate(outputs[start : start + GROUP], start):
            vector = _base64(output.embedding) if packed else output.embedding
            parts.append(json.dumps({"object": "embedding", "index": place, "embedding": vector}))
        await asyncio.sleep(0)
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    head: dict[str, Any] = {"object": "list", "model": model, "usage": usage}
    return Response(f'{json.dumps(head)[:-1]}, "data": [{", ".join(parts)}]}}', media_type="application/json")


def _base64(vector: list[float]) -> str:
    """As 32-bit floats, the first byte the lowest."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
