"""A contract for LangChain's `BaseLLM`, for want of a standard one: inherit from `BaseLLMContract` and say how to make
the model. It asks for what callers of any `BaseLLM` rely on: order, counts, callbacks, streams, stop strings, caches,
serialisation, and that one call's error is that call's only.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models.llms import BaseLLM
from langchain_core.load import dumpd, load
from langchain_core.outputs import Generation, GenerationChunk
from langchain_core.prompts import PromptTemplate
from langchain_recorder import AsyncRecorder, Recorder


class BaseLLMContract:
    """Class attributes of the subclass: `llm_class`, `prompts` (different ones), `settings` with which the model gives
    the same text for the same prompt. Flags say what it can do."""

    llm_class: ClassVar[type[BaseLLM]]
    prompts: ClassVar[list[str]]
    settings: ClassVar[dict[str, Any]]
    bad_prompt: ClassVar[str]
    """A prompt that is refused."""
    counts_tokens: ClassVar[bool] = True
    several_outputs: ClassVar[bool] = True

    @pytest.fixture
    def llm(self) -> BaseLLM:
        return self.llm_class(**self.settings)

    # -- calls -------------------------------------------------------------------------------------------------------

    def test_a_prompt_gives_text(self, llm: BaseLLM) -> None:
        text = llm.invoke(self.prompts[0])
        assert isinstance(text, str)
        assert text
        assert llm.invoke(self.prompts[0]) == text
        assert asyncio.run(llm.ainvoke(self.prompts[0])) == text

    def test_prompts_keep_their_order(self, llm: BaseLLM) -> None:
        alone = [llm.invoke(prompt) for prompt in self.prompts]
        result = llm.generate(self.prompts)
        assert [choices[0].text for choices in result.generations] == alone
        assert [choices[0].text for choices in asyncio.run(llm.agenerate(self.prompts)).generations] == alone
        assert llm.batch(self.prompts) == asyncio.run(llm.abatch(self.prompts)) == alone
        assert dict(llm.batch_as_completed(self.prompts)) == dict(enumerate(alone))
        assert all(type(choices[0]) is Generation for choices in result.generations)

    def test_every_prompt_has_a_run(self, llm: BaseLLM) -> None:
        recorder = Recorder()
        result = llm.generate(self.prompts, callbacks=[recorder])
        assert result.run is not None
        assert [run.run_id for run in result.run] == list(recorder.tokens)
        assert set(recorder.ends) == set(recorder.tokens)
        assert recorder.counts["start"] == recorder.counts["end"] == len(self.prompts)
        for run, choices in zip(result.run, result.generations, strict=True):
            assert "".join(recorder.tokens[run.run_id]) in ("", choices[0].text), "tokens go to their own run"
            assert recorder.ends[run.run_id].generations[0][0].text == choices[0].text

    def test_every_prompt_has_a_run_in_asyncio_too(self, llm: BaseLLM) -> None:
        recorder = AsyncRecorder()
        result = asyncio.run(llm.agenerate(self.prompts, callbacks=[recorder]))
        assert recorder.inner.counts["end"] == len(self.prompts)
        assert result.run is not None
        for run, choices in zip(result.run, result.generations, strict=True):
            assert "".join(recorder.inner.tokens[run.run_id]) in ("", choices[0].text)

    def test_usage_is_counted(self, llm: BaseLLM) -> None:
        if not self.counts_tokens:
            pytest.skip("counts no tokens")
        output = llm.generate(self.prompts).llm_output
        assert output is not None
        usage = output["token_usage"]
        assert usage["prompt_tokens"] > 0
        assert usage["completion_tokens"] > 0
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    def test_all_outputs_of_a_prompt_are_kept(self, llm: BaseLLM) -> None:
        if not self.several_outputs:
            pytest.skip("one output a prompt")
        for result in (llm.generate(self.prompts, n=3), asyncio.run(llm.agenerate(self.prompts, n=3))):
            assert [len(choices) for choices in result.generations] == [3] * len(self.prompts)

    def test_stop_strings_end_the_text_and_are_no_part_of_it(self, llm: BaseLLM) -> None:
        whole = llm.invoke(self.prompts[0])
        stop = whole[len(whole) // 2 :][:1]
        cut = whole[: whole.index(stop)]
        assert llm.invoke(self.prompts[0], stop=[stop]) == cut
        assert "".join(llm.stream(self.prompts[0], stop=[stop])) == cut
        assert llm.bind(stop=[stop]).invoke(self.prompts[0]) == cut
        stopping = self.llm_class(**{**self.settings, "stop": [stop]})
        assert stopping.invoke(self.prompts[0]) == cut

    # -- streams -----------------------------------------------------------------------------------------------------

    def test_a_stream_adds_up(self, llm: BaseLLM) -> None:
        text = llm.invoke(self.prompts[0])
        recorder = Recorder()
        pieces = list(llm.stream(self.prompts[0], {"callbacks": [recorder]}))
        assert len(pieces) > 1
        assert "".join(pieces) == text
        assert recorder.counts == {"start": 1, "token": len(pieces), "end": 1}
        (end,) = recorder.ends.values()
        assert end.generations[0][0].text == text
        assert isinstance(end.generations[0][0], GenerationChunk)

    def test_an_asynchronous_stream_adds_up(self, llm: BaseLLM) -> None:
        recorder = AsyncRecorder()

        async def read() -> list[str]:
            return [piece async for piece in llm.astream(self.prompts[0], {"callbacks": [recorder]})]

        pieces = asyncio.run(read())
        assert "".join(pieces) == llm.invoke(self.prompts[0])
        assert recorder.inner.counts == {"start": 1, "token": len(pieces), "end": 1}

    @pytest.mark.parametrize("version", ["v1", "v2"])
    @pytest.mark.filterwarnings("ignore:astream_events version")
    def test_events_have_each_piece_once(self, llm: BaseLLM, version: Any) -> None:
        chain = PromptTemplate.from_template("{text}") | llm

        async def read() -> list[Any]:
            events = chain.astream_events({"text": self.prompts[0]}, version=version)
            return [event["data"]["chunk"] async for event in events if event["event"] == "on_llm_stream"]

        pieces = [getattr(chunk, "text", chunk) for chunk in asyncio.run(read())]
        assert "".join(pieces) == llm.invoke(self.prompts[0])

    # -- around it ---------------------------------------------------------------------------------------------------

    def test_errors_are_their_calls_own(self, llm: BaseLLM) -> None:
        text = llm.invoke(self.prompts[0])
        recorder = Recorder()
        with pytest.raises(ValueError):
            llm.invoke(self.bad_prompt, {"callbacks": [recorder]})
        assert recorder.counts["error"] == 1
        mixed = [self.prompts[0], self.bad_prompt]
        for answers in (
            llm.batch(mixed, return_exceptions=True),
            asyncio.run(llm.abatch(mixed, return_exceptions=True)),  # type: ignore[arg-type]
        ):
            assert answers[0] == text
            assert isinstance(answers[1], ValueError)
        assert llm.invoke(self.prompts[0]) == text, "the next call is served"

    def test_unknown_arguments_are_refused(self, llm: BaseLLM) -> None:
        with pytest.raises(ValueError, match="temprature"):
            llm.invoke(self.prompts[0], temprature=1)
        with pytest.raises(ValueError, match="temprature"):
            self.llm_class(**self.settings, temprature=1)

    def test_a_cache_answers_the_second_time(self) -> None:
        llm = self.llm_class(**self.settings, cache=InMemoryCache())
        first = llm.generate(self.prompts)
        recorder = Recorder()
        second = llm.generate(self.prompts, callbacks=[recorder])
        assert recorder.counts["start"] == 0
        assert [one[0].text for one in second.generations] == [one[0].text for one in first.generations]

    def test_it_survives_serialisation(self, llm: BaseLLM) -> None:
        assert self.llm_class.is_lc_serializable()
        data = dumpd(llm)
        again = load(data, valid_namespaces=[llm.get_lc_namespace()[0]], allowed_objects="all")
        assert dumpd(again) == data
        assert again.asdict() == llm.asdict()

    def test_tokens_are_counted_as_the_model_does(self, llm: BaseLLM) -> None:
        ids = llm.get_token_ids(self.prompts[0])
        assert ids
        assert llm.get_num_tokens(self.prompts[0]) == len(ids)
        assert self.llm_class(**self.settings, custom_get_token_ids=lambda _: [1, 2]).get_num_tokens("x") == 2

    def test_traces_name_the_model(self, llm: BaseLLM) -> None:
        params = llm._get_ls_params(stop=["x"], model="another")
        assert params["ls_model_name"] == "another"
        assert params["ls_model_type"] == "llm"
        assert params["ls_stop"] == ["x"]
