"""Caller's side of a request: turns the engine's token events into pieces of text, and at the end into a
`RequestOutput`."""

from __future__ import annotations

from collections.abc import Callable

from octavo.decode.detokenize import Detokenizer
from octavo.decode.stop import StopStrings
from octavo.engine.request import BeamEvent, RawLogprobs, Request, TokenEvent
from octavo.outputs import CompletionOutput, Logprob, RequestOutput, StreamPiece, TokenLogprobs
from octavo.tokenizer import Tokenizer


class Assembler:
    """One per request; not shared between threads. `abort` is called with an index when a stop string ends an
    output."""

    def __init__(
        self, request: Request, prompt: str | None, tokenizer: Tokenizer, abort: Callable[[Request, int | None], None]
    ) -> None:
        self.request, self.prompt, self.tokenizer = request, prompt, tokenizer
        self.error: BaseException | None = None
        self._abort = abort
        self._choices = [_Choice(self, index) for index in range(request.params.choices)]
        self._open = len(self._choices)
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]

    @property
    def done(self) -> bool:
        """Every output has ended, or the request failed."""
        return self._open == 0 or self.error is not None

    def push(self, event: TokenEvent) -> StreamPiece | None:
        """Take in one event. Returns what is new to see, if anything is."""
        if self.done:
            return None
        choice = self._choices[event.index]
        if event.error is not None:
            if choice.output.finish_reason is None:
                self.error = event.error
                self._abort(self.request, None)
            return None
        if event.prompt_logprobs is not None and self._prompt_logprobs is not None:
            for raw in event.prompt_logprobs:
                token = self.request.prompt_ids[len(self._prompt_logprobs)]
                self._prompt_logprobs.append(self.convert(token, raw, self.request.params.prompt_logprobs or 0))
        if choice.output.finish_reason is not None:
            return None  # ended by a stop string; the engine heard of it a little later
        piece = choice.push(event)
        if piece.finish_reason is not None:
            self._open -= 1
            if self._open == 0:
                piece.output = self.output()
        return piece if piece.text or piece.token_ids or piece.finish_reason else None

    def output(self) -> RequestOutput:
        """All that has come so far. With `best_of`, the `n` best by cumulative log-probability."""
        outputs = [choice.output for choice in self._choices]
        params = self.request.params
        if params.choices > params.n:
            outputs = sorted(outputs, key=lambda output: -(output.cumulative_logprob or 0.0))[: params.n]
            for rank, output in enumerate(outputs):
                output.index = rank
        for output in outputs:
            if params.logprobs is None:  # they were there to rank by
                output.logprobs = None
        finished = all(output.finish_reason not in (None, "abort") for output in outputs)
        return RequestOutput(
            self.request.request_id, self.prompt, self.request.prompt_ids, outputs, finished, self.request.metrics,
            self._prompt_logprobs, None if self.request.source is None else list(self.request.source.ids),
        )  # fmt: skip

    def convert(self, token: int, raw: RawLogprobs, count: int) -> TokenLogprobs:
        """The `count` most likely tokens, best first, and the chosen one."""
        found = {
            top: Logprob(value, rank, self.tokenizer.token_text(top))
            for rank, (top, value) in enumerate(
                zip(raw.top_ids[:count], raw.top_logprobs[:count], strict=True), start=1
            )
        }
        found.setdefault(token, Logprob(raw.logprob, raw.rank, self.tokenizer.token_text(token)))
        return found


class _Choice:
    """Text and log-probabilities of one output."""

    def __init__(self, owner: Assembler, index: int) -> None:
        self.owner = owner
        params = owner.request.params
        wants = owner.request.wants_logprobs
        self.output = CompletionOutput(index, cumulative_logprob=0.0 if wants else None, logprobs=[] if wants else None)
        self._stops = StopStrings(params.stop or (), include=params.include_stop_str_in_output)
        self._text = (
            Detokenizer(owner.tokenizer, owner.request.prompt_ids, params.skip_special_tokens)
            if params.detokenize
            else None
        )

    def push(self, event: TokenEvent) -> StreamPiece:
        params, output = self.owner.request.params, self.output
        piece = StreamPiece("", [], output.index, finish_reason=event.finish_reason, stop_reason=event.stop_reason)
        for place, token in enumerate(event.token_ids):
            output.token_ids.append(token)
            piece.token_ids.append(token)
            if event.logprobs is not None and output.logprobs is not None:
                raw = event.logprobs[place]
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + raw.logprob
                output.logprobs.append(self.owner.convert(token, raw, params.logprobs or 0))
                if params.logprobs is not None:
                    piece.logprobs = [*(piece.logprobs or ()), output.logprobs[-1]]
            ends_here = event.finish_reason == "stop" and place == len(event.token_ids) - 1
            # the token that says "stop" is no text; the one that completes a grammar is
            hidden = ends_here and not params.include_stop_str_in_output and self.owner.request.is_end(token)
            if self._text is not None and not hidden:
                self._see(self._text.push([token]), piece)
                if piece.stop_reason is not None and event.stop_reason is None:
                    self.owner._abort(self.owner.request, output.index)
                    break
        if event.finish_reason is not None and self._stops.found is None and self._text is not None:
            self._see(self._text.flush(), piece)
            piece.text += self._stops.flush()
        output.text += piece.text
        output.finish_reason, output.stop_reason = piece.finish_reason, piece.stop_reason
        if isinstance(event, BeamEvent):
            output.cumulative_logprob, output.score = event.cumulative_logprob, event.score
        elif params.use_beam_search and output.finish_reason is not None and output.token_ids:
            output.score = (output.cumulative_logprob or 0.0) / len(output.token_ids) ** params.length_penalty
        return piece

    def _see(self, text: str, piece: StreamPiece) -> None:
        """Let new text through the stop strings, which do not count before `min_tokens`."""
        if len(self.output.token_ids) < self.owner.request.params.min_tokens:
            piece.text += text
            return
        piece.text += self._stops.push(text)
        if self._stops.found is not None:
            piece.finish_reason, piece.stop_reason = "stop", self._stops.found
