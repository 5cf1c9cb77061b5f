"""`AsyncLLM`: the same engine for asyncio code. Cancelling a task, or leaving a stream, ends its request in the
engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from octavo.beam_search import BeamSearchOutput, BeamSearchParams, beam_search_output, checked_params
from octavo.client import Client, Message, Prompt
from octavo.decode.assemble import Assembler
from octavo.engine.contract import Service, Work
from octavo.engine.embed_request import EmbedEvent, EmbedRequest
from octavo.engine.request import Request, Sink, TokenEvent
from octavo.errors import QueueFullError, RequestError
from octavo.llm import Params, _as_batch, _each, conversations, settled
from octavo.models.sources import DEFAULT_MODEL
from octavo.outputs import EmbeddingOutput, RequestOutput, StreamPiece, TranslationOutput
from octavo.post import post
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.translation.job import TranslationJob


class AsyncTokenStream:
    """Pieces of one request, for `async for`. `aclose()` ends the request. `begin` is awaited before the first
    piece, if there is one: a request whose grammar is new begins when it is compiled."""

    def __init__(
        self, assembler: Assembler, events: asyncio.Queue[TokenEvent], service: Service,
        begin: Callable[[], Awaitable[None]] | None = None,
    ) -> None:  # fmt: skip
        self._assembler, self._events, self._service, self._begin = assembler, events, service, begin

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamPiece:
        assembler = self._assembler
        self._service.check_process()
        try:
            if self._begin is not None:
                await self._begin()
                self._begin = None
            while not assembler.done:
                piece = assembler.push(await self._events.get())
                if piece is not None:
                    return piece
        except BaseException:  # cancelled while waiting
            self.close()
            raise
        if assembler.error is not None:
            raise assembler.error
        raise StopAsyncIteration

    @property
    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._assembler.output()

    def close(self) -> None:
        """End the request if it still runs. Never waits."""
        request = self._assembler.request
        if self._begin is not None:
            self._begin = None  # the engine has never heard of it
            for sequence in request.sequences:
                self._events.put_nowait(TokenEvent(sequence.index, finish_reason="abort"))
        elif not self._assembler.done:
            self._service.abort(request)

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _Whole:
    """One request whose output is wanted as a whole: nobody is woken for its pieces."""

    def __init__(self, make: Callable[[Sink], Assembler], service: Service) -> None:
        """`make` makes the request, with the sink that it is given."""
        self._service = service
        self._assembler = make(self.push)
        self.output: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()

    @property
    def request(self) -> Request:
        return self._assembler.request

    def push(self, event: TokenEvent) -> None:
        """Take in one event, on the event loop."""
        assembler = self._assembler
        if self.output.done():
            return
        try:
            assembler.push(event)
        except Exception as error:
            self._service.abort(self.request)
            self.output.set_exception(error)
            return
        if assembler.error is not None:
            self.output.set_exception(assembler.error)
        elif assembler.done:
            self.output.set_result(assembler.output())

    def close(self) -> None:
        """End it if it still runs."""
        if not self._assembler.done:
            self._service.abort(self.request)
        self.output.cancel()


class AsyncLLM(Client):
    """Like `LLM`, for asyncio. The constructor loads the model and blocks meanwhile; `await AsyncLLM.create(...)` does
    not."""

    @classmethod
    async def create(cls, model: str = DEFAULT_MODEL, **settings: Any) -> Self:
        """Start without blocking the event loop. The arguments are those of `LLM`."""
        return await asyncio.to_thread(cls, model, **settings)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncTokenStream:
        """Pieces of one completion: `async for piece in llm.stream(...)`."""
        return self._stream(prompt, sampling_params, priority)

    async def begin(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncTokenStream:
        """`stream` for whoever would rather wait while the queue is full. With `best_of` above `n` the pieces are of
        all outputs; the stream's `output` has the best."""
        stream = self._prepare(prompt, sampling_params, priority, True)
        await self.compile_grammars([stream._assembler.request])
        try:
            await _submit(stream._service, stream._assembler.request)
        except BaseException:
            stream.close()
            raise
        return stream

    async def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, priority: int = 0,
        return_exceptions: bool = False,
    ) -> list[RequestOutput]:  # fmt: skip
        """Complete one prompt or many; all run at once. See `LLM.generate`."""
        batch = _as_batch(prompts)
        return await self._run(batch, _each(sampling_params, len(batch)), priority, return_exceptions)

    async def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, priority: int = 0,
        return_exceptions: bool = False,
    ) -> list[BeamSearchOutput]:  # fmt: skip
        """See `LLM.beam_search`."""
        sampling = checked_params(params)
        outputs = await self.generate(prompts, sampling, priority=priority, return_exceptions=return_exceptions)
        return [
            beam_search_output(self.tokenizer, output, sampling) if isinstance(output, RequestOutput) else output
            for output in outputs
        ]

    def chat_stream(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **options: Any,
    ) -> AsyncTokenStream:
        """Pieces of the answer to one conversation. `options` as for `LLM.chat`."""
        return self._stream(
            self.chat_prompt(messages, _chat_options(options)), sampling_params, priority, special=False
        )

    async def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None, *, priority:
        int = 0,
        return_exceptions: bool = False, **options: Any,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer one conversation or many. `options` as for `LLM.chat`."""
        prompts = [self.chat_prompt(conversation, _chat_options(options)) for conversation in conversations(messages)]
        return await self._run(
            prompts, _each(sampling_params, len(prompts)), priority, return_exceptions, special=False
        )

    async def embed(
        self, texts: str | Sequence[str], *, prompt_name: str | None = None, return_exceptions: bool = False,
        wait: bool = True,
    ) -> list[EmbeddingOutput]:  # fmt: skip
        """Embeddings of texts. See `LLM.embed`. Without `wait`, `QueueFullError` is raised where there is no room."""
        from octavo.embedding import embed_requests, output_of

        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, EmbedEvent]] = asyncio.Queue()

        def sink(place: int, event: EmbedEvent) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, (place, event))

        service = self.engine.service
        requests: list[EmbedRequest] = []
        found: dict[int, EmbeddingOutput | BaseException] = {}
        try:
            groups = embed_requests(self.engine, texts, prompt_name, sink)
            while group := await asyncio.to_thread(next, groups, None):  # others have their turn while it tokenises
                requests += group
                for request in group:
                    if wait:
                        await _submit(service, request)
                    else:
                        service.submit(request)
            while len(found) < len(requests):
                place, event = await arrived.get()
                found[place] = output_of(requests[place], event)
        except BaseException:
            for request in requests:
                service.abort(request)
            raise
        return settled([found[place] for place in range(len(requests))], return_exceptions)

    async def translate(
        self, texts: str | Sequence[str], *, source: str | None = None, target: str | None = None,
        beam_width: int | None = None, max_tokens: int | None = None, sampling_params: SamplingParams | None = None,
        priority: int = 0, return_exceptions: bool = False,
    ) -> list[TranslationOutput]:  # fmt: skip
        """Translate texts. See `LLM.translate`."""
        job = await self._plan(texts, source, target, max_tokens, beam_width, sampling_params)
        params = [job.params] * len(job.prompts)
        outputs = await self._run(job.prompts, params, priority, True, special=not job.chats)
        return settled(job.outputs(outputs), return_exceptions)

    async def translate_stream(
        self, text: str, *, source: str | None = None, target: str | None = None, beam_width: int | None = None,
        max_tokens: int | None = None, sampling_params: SamplingParams | None = None, priority: int = 0,
    ) -> AsyncGenerator[str, None]:  # fmt: skip
        """One text in pieces, a sentence each, in order: `async for piece in llm.translate_stream(...)`."""
        job = await self._plan([text], source, target, max_tokens, beam_width, sampling_params)
        if not job.prompts:
            yield job.originals[0]
        waiting, running = iter(job.prompts), deque[AsyncTokenStream]()
        try:
            for place in range(len(job.prompts)):
                for prompt in islice(waiting, self.engine.limits.max_num_seqs - len(running)):
                    running.append(self._stream(prompt, job.params, priority, special=not job.chats))
                async for _ in running[0]:
                    pass
                yield job.pieces(place, running.popleft().output.text)
        finally:
            for sentence in running:
                sentence.close()

    async def _plan(
        self, texts: str | Sequence[str], source: str | None, target: str | None, max_tokens: int | None,
        beam_width: int | None, params: SamplingParams | None,
    ) -> TranslationJob:  # fmt: skip
        """In a thread: a book takes a while to be cut."""
        from octavo.translation.job import plan_translation

        return await asyncio.to_thread(
            plan_translation, self, texts, source, target, max_tokens=max_tokens, beam_width=beam_width,
            sampling_params=params,
        )  # fmt: skip

    def _stream(
        self, prompt: Prompt, params: SamplingParams | None, priority: int, *, special: bool = True
    ) -> AsyncTokenStream:
        if params is not None and isinstance(params, SamplingParams) and params.choices > params.n:
            raise RequestError("best_of above n cannot be streamed: the best are known at the end", "best_of")
        stream = self._prepare(prompt, params, priority, special)
        request, service = stream._assembler.request, stream._service
        if not request.lacks_grammar:
            service.submit(request)
            return stream

        async def begin() -> None:
            await self.compile_grammars([request])
            if stream._begin is not None:  # it was not closed meanwhile
                service.submit(request)

        stream._begin = begin
        return stream

    def _prepare(self, prompt: Prompt, params: SamplingParams | None, priority: int, special: bool) -> AsyncTokenStream:
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        assembler = self._make(prompt, params, priority, special, events.put_nowait)
        return AsyncTokenStream(assembler, events, self.engine.service)

    def _make(
        self, prompt: Prompt, params: SamplingParams | None, priority: int, special: bool, take: Sink
    ) -> Assembler:
        """A request whose events `take` is called with on the event loop. It may lack its grammar."""
        form = getattr(params, "structured_outputs", None)
        known = form is None or self.grammars.known(form)
        sink = post().sink(take)
        return self.make_request(prompt, params, sink, priority=priority, special=special, constrain=known)

    async def compile_grammars(self, requests: Sequence[Request]) -> None:
        """Give those their grammars that lack them: compiled in a thread, which leaves the interpreter to others."""
        grammars = self.grammars
        for request in requests:
            form = request.params.structured_outputs
            if form is not None and request.lacks_grammar:
                request.constrain((await asyncio.to_thread(grammars.compile, form)).start)

    async def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None], priority: int, return_exceptions:
        bool, *, special: bool = True,
    ) -> list[RequestOutput]:  # fmt: skip
        service = self.engine.service

        def whole(prompt: Prompt, parameters: SamplingParams | None) -> _Whole:
            return _Whole(lambda take: self._make(prompt, parameters, priority, special, take), service)

        waiting = [whole(p, q) for p, q in zip(prompts, params, strict=True)]
        try:
            await self.compile_grammars([one.request for one in waiting])
            for one in waiting:
                await _submit(service, one.request)
            results = await asyncio.gather(*(one.output for one in waiting), return_exceptions=True)
        except BaseException:
            for one in waiting:
                one.close()
            raise
        return settled(results, return_exceptions)

    async def aclose(self) -> None:
        """`close()` without blocking the event loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _submit(service: Service, request: Work) -> None:
    """Hand a request over; while the queue is full, wait without blocking the event loop."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return service.submit(request)
        except QueueFullError:
            room = asyncio.Event()

            def wake(room: asyncio.Event = room) -> None:
                with suppress(RuntimeError):  # the event loop was closed meanwhile
                    loop.call_soon_threadsafe(room.set)

            service.when_room(wake)
            await room.wait()


def _chat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    rest = dict(options)
    return {**rest.pop("chat_template_kwargs", {}), **rest}
