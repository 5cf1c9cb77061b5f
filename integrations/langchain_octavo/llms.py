"""`OctavoLLM`: completion for LangChain, on an engine in this process, with the fields of langchain-community's
`VLLM`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from octavo.client import Client
from octavo.errors import ConfigError, RequestError
from octavo.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamPiece
from octavo.sampling_params import SamplingParams
from pydantic import Field

from langchain_octavo.batching import AllAtOnce
from langchain_octavo.calls import AsyncRunning, Call, Running, arun, checked_piece, checked_timeout, run
from langchain_octavo.engines import EngineFields, unknown
from langchain_octavo.leaving import LeavableStreams
from langchain_octavo.results import answer_info, llm_output, logprobs, usage
from langchain_octavo.sampling import SAMPLING_NAMES, SamplingFields


class OctavoLLM(AllAtOnce, LeavableStreams, EngineFields, SamplingFields, BaseLLM):
    """Continues texts. Who used langchain-community's `VLLM` changes the import; what the engine cannot honour yet is a
    `ConfigError` that names it.

    >>> llm = OctavoLLM(model="Qwen/Qwen3-0.6B", max_new_tokens=64, top_p=0.9)              # doctest: +SKIP
    >>> llm.invoke("The capital of France is")                                              # doctest: +SKIP

    The fields are those of `SamplingFields` and `EngineFields`, and LangChain's own. Sampling parameters can be given
    in each call, `max_new_tokens` too. Nothing is loaded before the first call.
    """

    max_tokens: int | None = 512
    """Most tokens to make; `max_new_tokens` is the same. None: up to the model's length."""
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = -1
    n: int | None = 1
    use_beam_search: bool | None = False
    """Search by `beam_width` beams, or `best_of` as in vLLM."""
    tensor_parallel_size: int | None = 1
    """Only 1 is supported yet."""
    trust_remote_code: bool | None = False
    dtype: str = "auto"
    download_dir: str | None = None
    """Not supported: models are kept in the cache folder (see `docs/models.md`)."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for one call. Then its requests are ended and `TimeoutError` is raised."""

    other_names: ClassVar[Mapping[str, str]] = {"max_new_tokens": "max_tokens", "vllm_kwargs": "engine_kwargs"}

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def vllm_kwargs(self) -> dict[str, Any]:
        return self.engine_kwargs

    def _check(self) -> None:
        if self.download_dir is not None:
            raise ConfigError(
                "download_dir is not supported: set OCTAVO_CACHE to the folder where models shall be kept",
                "download_dir",
            )
        super()._check()
        self._sampling(None, {}, None)

    def _settings(self) -> dict[str, Any]:
        own = {
            "dtype": self.dtype, "trust_remote_code": bool(self.trust_remote_code),
            "tensor_parallel_size": self.tensor_parallel_size,
        }  # fmt: skip
        return {**own, **super()._settings()}

    # ---------------------------------------------------------------- what LangChain asks about it

    @property
    def _llm_type(self) -> str:
        return "octavo"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        given = {name: value for name, value in self._given_sampling().items() if name != "stop"}
        return {"model": self.model, **given, "stop": self.stop, "dtype": self.dtype, **self.engine_kwargs}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_octavo", "llms"]

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "octavo"
        return params

    # ---------------------------------------------------------------- one call, any number of prompts

    def _given(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling parameters given in a call."""
        given: dict[str, Any] = {}
        for name, value in kwargs.items():
            name = self.other_names.get(name, name)
            if name in SAMPLING_NAMES:
                given[name] = value
            elif name not in ("model", "timeout"):
                raise unknown(name, [*SAMPLING_NAMES, *self.other_names, "model", "timeout"])
        return given

    def _timeout(self, kwargs: Mapping[str, Any]) -> float | None:
        return checked_timeout(kwargs.get("timeout", self.timeout))

    def _generate(
        self, prompts: list[str], stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None, *,
        every_run: Sequence[CallbackManagerForLLMRun] | None = None, **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        """All prompts in one batch. Each token is reported to the run manager of its prompt."""
        given, timeout = self._given(kwargs), self._timeout(kwargs)
        llm = self._shared(kwargs.get("model")).llm
        params = self._sampling(stop, given, llm)
        managers = every_run or ([run_manager] if run_manager is not None else [])

        def report(number: int, piece: StreamPiece) -> None:
            managers[number].on_llm_new_token(piece.text, chunk=_chunk(llm, piece))

        wanted = _wanted(managers, prompts, params)
        outputs = run(llm, [(prompt, params) for prompt in prompts], timeout, report if wanted else None)
        return _result(llm, self._name(kwargs), outputs)

    async def _agenerate(
        self, prompts: list[str], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, *,
        every_run: Sequence[AsyncCallbackManagerForLLMRun] | None = None, **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        """The same for asyncio."""
        given, timeout = self._given(kwargs), self._timeout(kwargs)
        llm = await self._shared(kwargs.get("model")).start()
        params = self._sampling(stop, given, llm)
        managers = every_run or ([run_manager] if run_manager is not None else [])

        async def report(number: int, piece: StreamPiece) -> None:
            await managers[number].on_llm_new_token(piece.text, chunk=_chunk(llm, piece))

        wanted = _wanted(managers, prompts, params)
        outputs = await arun(llm, [(prompt, params) for prompt in prompts], timeout, report if wanted else None)
        return _result(llm, self._name(kwargs), outputs)

    def _name(self, kwargs: Mapping[str, Any]) -> str:
        return kwargs.get("model") or self.model

    # The base class hands on the first run manager only.

    def _generate_helper(
        self, prompts: list[str], stop: list[str] | None, run_managers: list[CallbackManagerForLLMRun], **kwargs: Any
    ) -> LLMResult:
        return super()._generate_helper(prompts, stop, run_managers, every_run=run_managers, **kwargs)

    async def _agenerate_helper(
        self, prompts: list[str], stop: list[str] | None, run_managers: list[AsyncCallbackManagerForLLMRun],
        **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        return await super()._agenerate_helper(prompts, stop, run_managers, every_run=run_managers, **kwargs)

    # ---------------------------------------------------------------- streams

    def _call(self, prompt: str, stop: list[str] | None, kwargs: Mapping[str, Any], client: Client) -> Call:
        params = self._sampling(stop, self._given(kwargs), client)
        if params.choices > 1:
            name = "n" if params.n > 1 else "best_of"
            raise RequestError(f"{name} above 1 cannot be streamed: leave it out, or use invoke or generate", name)
        return prompt, params

    def _stream(
        self, prompt: str, stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:  # fmt: skip
        timeout = self._timeout(kwargs)
        llm = self._shared(kwargs.get("model")).llm
        for _, piece in Running(llm, [self._call(prompt, stop, kwargs, llm)], timeout):
            chunk = _chunk(llm, checked_piece(piece), self._name(kwargs))
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self, prompt: str, stop: list[str] | None = None, run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:  # fmt: skip
        timeout = self._timeout(kwargs)
        llm = await self._shared(kwargs.get("model")).start()
        with closing(await AsyncRunning.begin(llm, self._call(prompt, stop, kwargs, llm), timeout)) as running:
            async for piece in running:
                chunk = _chunk(llm, checked_piece(piece), self._name(kwargs))
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk


def _wanted(managers: Sequence[Any], prompts: Sequence[str], params: SamplingParams) -> bool:
    """Whether anybody listens for tokens. Not of outputs that may not be among the best."""
    listening = len(managers) == len(prompts) and any(manager.handlers for manager in managers)
    return listening and params.choices == params.n


def _chunk(client: Client, piece: StreamPiece, model: str = "") -> GenerationChunk:
    info: dict[str, Any] = {}
    if piece.logprobs is not None:
        info["logprobs"] = logprobs(client.tokenizer, piece.token_ids, piece.logprobs)
    if piece.output is not None:
        metrics = piece.output.metrics
        info |= answer_info(model, piece.finish_reason, piece.stop_reason, metrics)
        info["usage_metadata"] = usage(metrics)
    return GenerationChunk(text=piece.text, generation_info=info or None)


def _result(client: Client, model: str, outputs: Sequence[RequestOutput]) -> LLMResult:
    generations = [
        [_generation(client, model, choice, output.metrics) for choice in output.outputs] for output in outputs
    ]
    return LLMResult(generations=generations, llm_output=llm_output(model, [output.metrics for output in outputs]))


def _generation(client: Client, model: str, choice: CompletionOutput, metrics: RequestMetrics) -> Generation:
    info = answer_info(model, choice.finish_reason, choice.stop_reason, metrics)
    info["usage_metadata"] = usage(metrics)
    if choice.logprobs is not None:
        info["logprobs"] = logprobs(client.tokenizer, choice.token_ids, choice.logprobs)
    if choice.cumulative_logprob is not None:
        info["cumulative_logprob"] = choice.cumulative_logprob
    if choice.score is not None:
        info["score"] = choice.score
    return Generation(text=choice.text, generation_info=info)
