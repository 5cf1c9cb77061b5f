"""`/v1/completions`: prompts as text or token ids, one or many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.chat import response_format
from octavo.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamPiece, TokenLogprobs
from octavo.sampling_params import MAX_CHOICES
from octavo.server.call import Answer, Call, respond
from octavo.server.errors import refused
from octavo.server.models import Loaded
from octavo.server.prompts import off_loop, salt_of, salted, truncated
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.run import Run
from octavo.server.sampling import form_name, sampling_params
from octavo.server.shapes import finite, prompt_logprobs, token_name, usage
from octavo.server.streams import DONE, Frames, frame, json_text
from octavo.structured_outputs import StructuredOutputsParams

DEFAULT_MAX_TOKENS = 16
MAX_OUTPUTS = 4096
"""Of all prompts of a call together."""


async def completions(request: Request) -> Response:
    """OpenAI's (older) completions."""
    call = Call(request)
    body = await call.body(CompletionRequest)

    async def prepare(loaded: Loaded) -> Answer:
        return await CompletionAnswer.prepare(call, body, loaded)

    return await respond(call, "completions", body.model, bool(body.stream), body.priority or 0, prepare)


class CompletionAnswer:
    """One call. Implements `Answer`."""

    def __init__(self, call: Call, body: CompletionRequest, loaded: Loaded, prompts: list[Any], size: int) -> None:
        self._body, self._tokenizer = body, loaded.llm.tokenizer
        self.names = {"prompt_token_ids": "prompt", "structured_outputs": form_name(body)}
        salt = salt_of(call.salt, body.cache_salt)
        self.prompts, self.size = [salted(prompt, salt) for prompt in prompts], size
        self.special = body.add_special_tokens is not False
        self._id, self._created, self._model = f"cmpl-{call.id}", int(time.time()), body.model or loaded.name
        self._echo = bool(body.echo)
        self._nothing = body.max_tokens == 0
        """The prompt alone is wanted: the engine makes one token, which is dropped."""
        if self._nothing:
            if not self._echo or body.stream:
                raise refused("max_tokens must be at least 1, but for echo=true without stream", "max_tokens")
            body = body.model_copy(update={"max_tokens": 1})
        self.params = sampling_params(
            body, loaded.llm, max_tokens=DEFAULT_MAX_TOKENS, best_of=body.best_of, logprobs=body.logprobs
        )
        self.params = replace(self.params, structured_outputs=_form(body, self.params.structured_outputs))
        if self._echo and body.logprobs is not None and body.prompt_logprobs is None:
            self.params = replace(self.params, prompt_logprobs=body.logprobs)
        if len(prompts) * self.params.width > MAX_OUTPUTS:
            message = f"{len(prompts)} prompts with {self.params.width} outputs each are more than {MAX_OUTPUTS}"
            raise refused(message, "n" if self.params.width > 1 else "prompt")

    @classmethod
    async def prepare(cls, call: Call, body: CompletionRequest, loaded: Loaded) -> CompletionAnswer:
        """Raises `RequestError` or `ApiError`."""
        if body.n is not None and not 1 <= body.n <= MAX_CHOICES:
            raise refused(f"n must be from 1 to {MAX_CHOICES}", "n")
        _check_stream(body)
        prompts = _prompts(body)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        for text in texts:
            loaded.bound.check(text, "prompt")
        size = sum(map(len, texts))
        keep = body.truncate_prompt_tokens
        if keep is not None:
            special = body.add_special_tokens is not False
            tokenizer = loaded.llm.tokenizer

            def cut() -> list[Any]:
                ids = [tokenizer.encode(one, special) if isinstance(one, str) else one for one in prompts]
                return [truncated(one, keep, loaded.llm) for one in ids]

            prompts, size = await off_loop(size, cut), 0
        return cls(call, body, loaded, prompts, size)

    # ---------------------------------------------------------------- whole

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices = [
            self._choice(place, output, choice)
            for place, output in enumerate(outputs)
            for choice in output.outputs
        ]  # fmt: skip
        metrics = [output.metrics for output in outputs]
        found = usage(metrics)
        if self._nothing:
            found |= {"completion_tokens": 0, "total_tokens": found["prompt_tokens"]}
        return {**self._head(), "choices": choices, "usage": found}

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}

    def _choice(self, place: int, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        body = self._body
        text, tokens, given = ("", [], []) if self._nothing else (one.text, one.token_ids, one.logprobs or [])
        prompt = self._prompt_text(output.prompt, output.prompt_token_ids) if self._echo else ""
        choice: dict[str, Any] = {
            "index": place * self.params.n + one.index, "text": prompt + text, "logprobs": None,
            "finish_reason": "length" if self._nothing else one.finish_reason, "stop_reason": one.stop_reason,
        }  # fmt: skip
        if body.logprobs is not None:
            logprobs = Logprobs(self, 0)
            if self._echo:
                logprobs.add(output.prompt_token_ids, output.prompt_logprobs or [])
            logprobs.add(tokens, given)
            choice["logprobs"] = logprobs.found
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"token_ids": tokens, "prompt_token_ids": output.prompt_token_ids}
        return choice

    def _prompt_text(self, text: str | None, ids: Sequence[int]) -> str:
        return text if text is not None else self._tokenizer.decode(ids, skip_special_tokens=False)

    def logprobs_entry(self, token: int, ranked: TokenLogprobs | None) -> tuple[str, float | None, Any]:
        """A token, its log-probability and the likeliest ones, as this API has them."""
        as_id = bool(self._body.return_tokens_as_token_ids)
        name = token_name(self._tokenizer, token, as_id)
        if ranked is None:
            return name, None, None
        top = {token_name(self._tokenizer, other, as_id): finite(one.logprob) for other, one in ranked.items()}
        return name, finite(ranked[token].logprob), top

    # ---------------------------------------------------------------- streamed

    async def frames(self, run: Run) -> Frames:
        chunks = _Chunks(self._head(), self._body)
        width = self.params.n
        logprobs = [Logprobs(self, 0) for _ in range(len(self.prompts) * width)]
        if self._echo or self._body.return_token_ids:
            yield b"".join(
                chunks.prompt(place * width + index, self._prompt_text(text, ids) if self._echo else "", ids)
                for place, (text, ids) in enumerate(zip(run.prompt_texts, run.prompt_ids, strict=True))
                for index in range(width)
            )
        async for pieces in run.pieces():
            yield b"".join(
                chunks.piece(place * width + piece.index, piece, logprobs[place * width + piece.index], run)
                for place, piece in pieces
            )
        outputs = run.outputs()
        if chunks.with_usage:
            yield frame({**self._head(), "choices": [], "usage": usage([output.metrics for output in outputs])})
        yield DONE


class Logprobs:
    """The `logprobs` of one choice. `offset`: characters before its first token."""

    def __init__(self, answer: CompletionAnswer, offset: int) -> None:
        self._answer, self._offset = answer, offset
        self.clear()

    def clear(self) -> None:
        """Begin the next chunk."""
        self.found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, tokens: Sequence[int], given: Sequence[TokenLogprobs | None]) -> None:
        for token, ranked in zip(tokens, given, strict=False):
            name, logprob, top = self._answer.logprobs_entry(token, ranked)
            self.found["tokens"].append(name)
            self.found["token_logprobs"].append(logprob)
            self.found["top_logprobs"].append(top)
            self.found["text_offset"].append(self._offset)
            self._offset += len(self._answer._tokenizer.token_text(token))


class _Chunks:
    """Chunks of one stream."""

    def __init__(self, head: dict[str, Any], body: CompletionRequest) -> None:
        options = body.stream_options
        self.with_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._with_ids, self._head = bool(body.return_token_ids), head
        # nearly all chunks are plain text: of these only the text is written anew
        self._before = frame(head)[: -len(b"}\n\n")].decode() + ',"choices":[{"index":'
        tail = ',"usage":null' if self.with_usage else ""
        self._after = f',"logprobs":null,"finish_reason":null}}]{tail}}}\n\n'

    def prompt(self, index: int, text: str, ids: list[int]) -> bytes:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        if self._with_ids:
            choice["prompt_token_ids"] = ids
        return self._frame(choice, ())

    def piece(self, index: int, piece: StreamPiece, logprobs: Logprobs, run: Run) -> bytes:
        plain = piece.finish_reason is None and piece.logprobs is None and not self._with_ids and not self._continuous
        if plain:
            if not piece.text:
                return b""
            return f'{self._before}{index},"text":{json_text(piece.text)}{self._after}'.encode()
        choice: dict[str, Any] = {
            "index": index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }  # fmt: skip
        if piece.logprobs is not None:
            logprobs.add(piece.token_ids, piece.logprobs)
            choice["logprobs"] = logprobs.found
            logprobs.clear()
        if self._with_ids:
            choice["token_ids"] = piece.token_ids
        return self._frame(choice, run.metrics)

    def _frame(self, choice: dict[str, Any], metrics: Sequence[RequestMetrics]) -> bytes:
        found: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._continuous:
            found["usage"] = usage(metrics)
        elif self.with_usage:
            found["usage"] = None
        return frame(found)


# -- what is asked ---------------------------------------------------------------------------------------------------


def _prompts(body: CompletionRequest) -> list[Any]:
    """Each a text or a list of ids."""
    prompt = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


def _check_stream(body: CompletionRequest) -> None:
    if not body.stream:
        if body.stream_options is not None:
            raise refused("stream_options need stream=true", "stream_options")
        return
    if body.prompt_logprobs is not None:
        raise refused("prompt_logprobs cannot be streamed: leave it out, or stream", "prompt_logprobs")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refused("best_of above n cannot be streamed: the best are known at the end", "best_of")
    if body.echo and body.logprobs is not None:
        raise refused("echo with logprobs cannot be streamed: leave out one of echo, logprobs and stream", "echo")


def _form(body: CompletionRequest, given: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
    """Of `response_format`, or what another field gave. Raises `RequestError` or `ApiError`."""
    form = None if body.response_format is None else response_format(body.response_format.model_dump(by_alias=True))
    if not form:
        return given
    if given is not None:
        raise refused(f"response_format and {form_name(body)} exclude each other: give one of them", "response_format")
    return StructuredOutputsParams(json=form.get("json_schema"), json_object=form.get("json_object"))
