"""`Answer`: pieces of one request become LlamaIndex's responses. One for each request; called by `llm.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LogProb
from llama_index.llms.octavo.messages import to_message

from octavo.chat import Delta, ReasoningDelta, TextDelta
from octavo.outputs import CompletionOutput, Logprob, RequestOutput, StreamPiece, TokenLogprobs
from octavo.tokenizer import Tokenizer

Logprobs = list[list[LogProb]] | None


class Parser(Protocol):
    """Tells text, reasoning and tool calls apart. `octavo.chat.ChatParser` is one."""

    def push(self, text: str) -> Sequence[Delta]: ...

    def finish(self) -> Sequence[Delta]: ...


class PlainParser:
    """All is text: for prompts that no chat template made."""

    def push(self, text: str) -> Sequence[Delta]:
        return (TextDelta(text),)

    def finish(self) -> Sequence[Delta]:
        return ()


class Answer:
    """What the first output of a request has said so far. Further outputs (`n` above 1) are in `raw` at the end."""

    def __init__(self, model: str, parser: Parser, tokenizer: Tokenizer) -> None:
        self._model, self._parser, self._tokenizer = model, parser, tokenizer
        self._text = self._reasoning = ""
        self._calls: list[list[str]] = []  # id, name, arguments
        self._said = self._thought = ""

    # ---------------------------------------------------------------- in

    def push(self, piece: StreamPiece) -> bool:
        """Take in one piece. True if there is something new to show."""
        self._said = self._thought = ""
        if piece.index != 0:
            return piece.output is not None
        news = list(self._parser.push(piece.text)) if piece.text else []
        if piece.finish_reason is not None:
            news += self._parser.finish()
        self._take(news)
        return bool(news) or piece.finish_reason is not None or piece.logprobs is not None or piece.output is not None

    def _take_whole(self, output: RequestOutput) -> None:
        self._take([*self._parser.push(output.outputs[0].text), *self._parser.finish()])

    def _take(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, TextDelta):
                self._said += delta.text
            elif isinstance(delta, ReasoningDelta):
                self._thought += delta.text
            else:
                while len(self._calls) <= delta.index:
                    self._calls.append(["", "", ""])
                call = self._calls[delta.index]
                call[0] += delta.id or ""
                call[1] += delta.name or ""
                call[2] += delta.arguments
        self._text += self._said
        self._reasoning += self._thought

    # ---------------------------------------------------------------- out

    def chat_piece(self, piece: StreamPiece) -> ChatResponse:
        """The message so far, and what the last piece added."""
        more: dict[str, Any] = {"thinking_delta": self._thought} if self._thought else {}
        if piece.output is not None or piece.logprobs is not None:
            return self._chat(piece.output, self._logprobs(piece), self._said, more)
        return ChatResponse(message=self._message(False), delta=self._said, additional_kwargs=more)

    def chat(self, output: RequestOutput) -> ChatResponse:
        """A request that was not streamed."""
        self._take_whole(output)
        return self._chat(output, self._logprobs(output.outputs[0]), None, {})

    def _chat(
        self, output: RequestOutput | None, logprobs: Logprobs, delta: str | None, more: dict[str, Any]
    ) -> ChatResponse:
        return ChatResponse(
            message=self._message(output is not None), delta=delta, logprobs=logprobs, raw=self._raw(output),
            additional_kwargs=more | self._counts(output),
        )  # fmt: skip

    def _message(self, finished: bool) -> ChatMessage:
        return to_message(self._text, self._reasoning, self._calls, finished=finished)

    def completion_piece(self, piece: StreamPiece) -> CompletionResponse:
        """The text so far, and what the last piece added."""
        if piece.output is None and piece.logprobs is None and not self._reasoning:
            return CompletionResponse(text=self._text, delta=self._said)
        return self._completion(piece.output, self._logprobs(piece), self._said)

    def completion(self, output: RequestOutput) -> CompletionResponse:
        """A request that was not streamed."""
        self._take_whole(output)
        return self._completion(output, self._logprobs(output.outputs[0]), None)

    def _completion(self, output: RequestOutput | None, logprobs: Logprobs, delta: str | None) -> CompletionResponse:
        more = {"thinking": self._reasoning} if self._reasoning else {}
        return CompletionResponse(
            text=self._text, delta=delta, logprobs=logprobs, raw=self._raw(output),
            additional_kwargs=more | self._counts(output),
        )  # fmt: skip

    # ---------------------------------------------------------------- beside the text

    def _finish_reason(self, output: CompletionOutput) -> str | None:
        calls = output.index == 0 and self._calls and output.finish_reason == "stop"
        return "tool_calls" if calls else output.finish_reason

    def _counts(self, output: RequestOutput | None) -> dict[str, Any]:
        if output is None:
            return {}
        reason = self._finish_reason(output.outputs[0])
        return {**_usage(output), "cached_tokens": output.num_cached_tokens, "finish_reason": reason}

    def _raw(self, output: RequestOutput | None) -> dict[str, Any] | None:
        """The request as plain values: every output, `usage` where LlamaIndex's token counter looks for it, timings in
        seconds."""
        if output is None:
            return None
        metrics = output.metrics
        raw: dict[str, Any] = {
            "id": output.request_id,
            "model": self._model,
            "choices": [
                {
                    "index": one.index, "text": one.text, "token_ids": one.token_ids,
                    "finish_reason": self._finish_reason(one), "stop_reason": one.stop_reason,
                    "logprobs": one.logprobs and [_as_dicts(token) for token in one.logprobs],
                }
                for one in output.outputs
            ],
            "usage": {**_usage(output), "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens}},
            "metrics": {
                "queue_time": metrics.queue_time, "time_to_first_token": metrics.first_token_time,
                "time_per_token": metrics.time_per_token,
            },
        }  # fmt: skip
        if output.prompt_logprobs is not None:
            raw["prompt_logprobs"] = [token and _as_dicts(token) for token in output.prompt_logprobs]
        return raw

    def _logprobs(self, made: StreamPiece | CompletionOutput) -> Logprobs:
        """For each token: itself, then the most likely others, best first."""
        if made.logprobs is None or made.index != 0:
            return None
        return [
            [
                self._logprob(token, found[token]),
                *(self._logprob(id_, one) for id_, one in found.items() if id_ != token),
            ]
            for token, found in zip(made.token_ids, made.logprobs, strict=True)
        ]

    def _logprob(self, token: int, one: Logprob) -> LogProb:
        return LogProb(
            token=one.decoded_token or "", logprob=one.logprob, bytes=list(self._tokenizer.token_bytes(token))
        )


def _usage(output: RequestOutput) -> dict[str, int]:
    prompt, made = output.metrics.prompt_tokens, output.metrics.output_tokens
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _as_dicts(token: TokenLogprobs) -> list[dict[str, Any]]:
    return [
        {"token_id": token_id, "token": one.decoded_token, "logprob": one.logprob, "rank": one.rank}
        for token_id, one in token.items()
    ]
