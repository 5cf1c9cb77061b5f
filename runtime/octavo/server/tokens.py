"""`/tokenize` and `/detokenize`: a model's own tokenizer, and its chat template."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from octavo.sampling_params import SamplingParams
from octavo.server.call import Call
from octavo.server.errors import refused
from octavo.server.messages import chat_messages, check_template, template_variables
from octavo.server.models import Loaded
from octavo.server.planning import planned
from octavo.server.prompts import off_loop
from octavo.server.protocol.tokens import DetokenizeRequest, TokenizeRequest


async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of the prompt that messages become."""
    call = Call(request)
    body = await call.body(TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise refused("give one of prompt and messages", "prompt")
    async with call.server.models.use(body.model) as loaded:
        ids = await (_of_text(loaded, body) if body.prompt is not None else _of_chat(call, loaded, body))
        found: dict[str, Any] = {
            "count": len(ids), "max_model_len": loaded.llm.engine.limits.max_model_len, "tokens": ids,
        }  # fmt: skip
        if body.return_token_strs:
            found["token_strs"] = [loaded.llm.tokenizer.token_text(token) for token in ids]
        return JSONResponse(found)


async def _of_text(loaded: Loaded, body: TokenizeRequest) -> list[int]:
    text = body.prompt or ""
    loaded.bound.check(text, "prompt")
    special = body.add_special_tokens is not False
    return await off_loop(len(text), lambda: loaded.llm.tokenizer.encode(text, special))


async def _of_chat(call: Call, loaded: Loaded, body: TokenizeRequest) -> list[int]:
    check_template(call, body.chat_template)
    loaded.check_generates()
    messages, size = chat_messages(body.messages or [])
    tools = None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools]
    plan = await planned(
        loaded, messages, size, SamplingParams(), tools=tools, variables=template_variables(body),
        template=body.chat_template, special=bool(body.add_special_tokens),
    )  # fmt: skip
    return list(plan.prompt["prompt_token_ids"])


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens too."""
    call = Call(request)
    body = await call.body(DetokenizeRequest)
    async with call.server.models.use(body.model) as loaded:
        vocabulary = loaded.llm.engine.limits.vocab_size
        if any(token >= vocabulary for token in body.tokens):
            raise refused(f"token ids must be below {vocabulary}", "tokens")
        tokenizer = loaded.llm.tokenizer
        text = await off_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return JSONResponse({"prompt": text})
