"""`ToolContract` and `StructuredContract`: the second half of what an LLM class of LlamaIndex owes its users (see
`llama_index_contract`). They hold whatever the model would like to say, so the class must enforce calls and schemas.

No `from __future__ import annotations` here: LlamaIndex reads the types of a tool's arguments from the function.
"""

import json
import time
from enum import Enum
from itertools import pairwise
from typing import Any, Literal

import pytest
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index_contract import LONG, usage
from llama_index_recorder import recorded


def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


def weather(city: Literal["Paris", "Oslo"], unit: Literal["C", "F"] = "C") -> str:
    """The weather in a city."""
    return f"12 {unit} in {city}"


def fail(reason: str) -> str:
    """Always fails."""
    return "because " + 3  # type: ignore[operator]


def ping() -> str:
    """Takes nothing."""
    return "pong"


ADD, WEATHER, FAIL, PING = (FunctionTool.from_defaults(fn) for fn in (add, weather, fail, ping))
TOOLS = [ADD, WEATHER]
ASK = "What is 2 + 3, and how is the weather in Paris?"


class ToolContract:
    """Tools: required, chosen, refused, streamed, called; their errors; their history."""

    @pytest.fixture
    def llm(self) -> FunctionCallingLLM:
        """A fresh object for each test; `max_tokens` must have room for a call (200)."""
        raise NotImplementedError

    # ---------------------------------------------------------------- calls

    def test_a_required_call(self, llm: FunctionCallingLLM) -> None:
        self.check_one_call(llm, llm.chat_with_tools(TOOLS, user_msg=ASK, tool_required=True))

    async def test_a_required_call_async(self, llm: FunctionCallingLLM) -> None:
        self.check_one_call(llm, await llm.achat_with_tools(TOOLS, user_msg=ASK, tool_required=True))

    def test_a_required_call_streamed(self, llm: FunctionCallingLLM) -> None:
        self.check_streamed_call(llm, list(llm.stream_chat_with_tools(TOOLS, user_msg=ASK, tool_required=True)))

    async def test_a_required_call_streamed_async(self, llm: FunctionCallingLLM) -> None:
        stream = await llm.astream_chat_with_tools(TOOLS, user_msg=ASK, tool_required=True)
        self.check_streamed_call(llm, [piece async for piece in stream])

    def test_history_and_message_objects(self, llm: FunctionCallingLLM) -> None:
        history = [ChatMessage(role="system", content="You use tools.")]
        response = llm.chat_with_tools(
            TOOLS, user_msg=ChatMessage(content=ASK), chat_history=history, tool_required=True
        )
        self.check_one_call(llm, response)
        assert len(history) == 1, "the history is the caller's"

    @pytest.mark.parametrize("form", ["name", "dict"])
    def test_a_chosen_tool(self, llm: FunctionCallingLLM, form: str) -> None:
        for tool in TOOLS:
            name = tool.metadata.get_name()
            choice = name if form == "name" else {"type": "function", "function": {"name": name}}
            response = llm.chat_with_tools(TOOLS, user_msg=ASK, tool_choice=choice)
            assert [call.tool_name for call in self.check_calls(llm, response)] == [name]

    def test_a_tool_without_arguments(self, llm: FunctionCallingLLM) -> None:
        response = llm.chat_with_tools([PING], user_msg="Ping.", tool_required=True)
        (call,) = llm.get_tool_calls_from_response(response)
        assert (call.tool_name, call.tool_kwargs) == ("ping", {})

    def test_no_tool_is_called_when_none_may_be(self, llm: FunctionCallingLLM) -> None:
        response = llm.chat_with_tools(TOOLS, user_msg=ASK, tool_choice="none")
        assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
        assert isinstance(response.message.content, str)
        with pytest.raises(ValueError, match="tool"):
            llm.get_tool_calls_from_response(response)

    def test_no_tools_at_all(self, llm: FunctionCallingLLM) -> None:
        response = llm.chat_with_tools([], user_msg=ASK)
        assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []

    def test_several_calls_are_all_sound(self, llm: FunctionCallingLLM) -> None:
        response = llm.chat_with_tools(TOOLS, user_msg=ASK, tool_required=True, allow_parallel_tool_calls=True)
        assert self.check_calls(llm, response)

    def test_auto_is_text_or_sound_calls(self, llm: FunctionCallingLLM) -> None:
        self.check_calls(llm, llm.chat_with_tools(TOOLS, user_msg=ASK))

    def check_one_call(self, llm: FunctionCallingLLM, response: ChatResponse) -> None:
        assert len(self.check_calls(llm, response)) == 1
        assert response.additional_kwargs["finish_reason"] == "tool_calls"

    def check_calls(self, llm: FunctionCallingLLM, response: ChatResponse) -> list[Any]:
        """The calls in a response, of which every one could be made."""
        assert response.message.role == MessageRole.ASSISTANT
        calls = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
        blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        legacy = response.message.additional_kwargs.get("tool_calls", [])
        assert len(calls) == len(blocks) == len(legacy)
        assert len({call.tool_id for call in calls}) == len(calls)
        for call, block, old in zip(calls, blocks, legacy, strict=True):
            (tool,) = (tool for tool in TOOLS if tool.metadata.get_name() == call.tool_name)
            assert tool.metadata.fn_schema is not None
            tool.metadata.fn_schema.model_validate(call.tool_kwargs)
            assert (call.tool_id, call.tool_name, call.tool_kwargs) == (
                block.tool_call_id,
                block.tool_name,
                block.tool_kwargs,
            )
            assert call.tool_id
            assert old["function"]["name"] == call.tool_name
            assert json.loads(old["function"]["arguments"]) == call.tool_kwargs
        assert usage(response)["completion_tokens"] > 0
        return calls

    def check_streamed_call(self, llm: FunctionCallingLLM, pieces: list[ChatResponse]) -> None:
        self.check_one_call(llm, pieces[-1])
        (whole,) = (block for block in pieces[-1].message.blocks if isinstance(block, ToolCallBlock))
        parts, texts = [], []
        for piece in pieces:
            llm.get_tool_calls_from_response(piece, error_on_no_tool_call=False)  # an agent looks at every piece
            for block in piece.message.blocks:
                if isinstance(block, ToolCallBlock):
                    assert (block.tool_call_id, block.tool_name) == (whole.tool_call_id, whole.tool_name)
                    if isinstance(block.tool_kwargs, str):
                        parts.append(block.tool_kwargs)
            texts.append(piece.message.content or "")
        assert len(set(parts)) > 1, "arguments come in pieces"
        assert all(later.startswith(earlier) for earlier, later in pairwise(parts))
        assert "".join(piece.delta or "" for piece in pieces) == texts[-1]

    # ---------------------------------------------------------------- calling

    def test_predict_and_call(self, llm: FunctionCallingLLM) -> None:
        answer = llm.predict_and_call([ADD], user_msg="What is 2 + 3?", tool_required=True)
        (output,) = answer.sources
        assert not output.is_error
        assert output.raw_output == sum(output.raw_input["kwargs"].values())
        assert answer.response == str(output.raw_output)

    async def test_apredict_and_call(self, llm: FunctionCallingLLM) -> None:
        answer = await llm.apredict_and_call([WEATHER], user_msg="The weather in Oslo?", tool_required=True)
        assert answer.sources[0].raw_output in {f"12 {unit} in {city}" for unit in "CF" for city in ("Paris", "Oslo")}

    def test_predict_and_call_without_a_call(self, llm: FunctionCallingLLM) -> None:
        with pytest.raises(ValueError, match="tool"):
            llm.predict_and_call(TOOLS, user_msg=ASK, tool_choice="none")
        answer = llm.predict_and_call(TOOLS, user_msg=ASK, tool_choice="none", error_on_no_tool_call=False)
        assert answer.sources == []

    def test_an_error_inside_a_tool_is_told_and_the_next_call_is_served(self, llm: FunctionCallingLLM) -> None:
        answer = llm.predict_and_call([FAIL], user_msg="Fail.", tool_required=True)
        assert answer.sources[0].is_error
        assert isinstance(answer.sources[0].exception, TypeError)
        with pytest.raises(ValueError, match="concatenate"):
            llm.predict_and_call([FAIL], user_msg="Fail.", tool_required=True, error_on_tool_error=True)
        assert llm.predict_and_call([PING], user_msg="Ping.", tool_required=True).response == "pong"

    # ---------------------------------------------------------------- history

    def test_a_call_and_its_result_are_part_of_the_conversation(self, llm: FunctionCallingLLM) -> None:
        """A whole round: the model's own message goes back with the tool's result, and both reach the prompt."""
        first = llm.chat_with_tools([WEATHER], user_msg=ASK, tool_required=True)
        (call,) = llm.get_tool_calls_from_response(first)
        result = ChatMessage(role="tool", content="It is 12 C.", additional_kwargs={"tool_call_id": call.tool_id})
        asked = ChatMessage(content=ASK)
        last = llm.chat([asked, first.message, result])
        assert usage(last)["prompt_tokens"] > usage(llm.chat([asked]))["prompt_tokens"]
        again = llm.chat_with_tools([WEATHER], chat_history=[asked, first.message, result], tool_required=True)
        assert self.check_calls(llm, again)

    def test_calls_in_the_form_of_older_histories(self, llm: FunctionCallingLLM) -> None:
        """The same prompt from blocks, from `additional_kwargs`, and from both."""
        call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
        block = ToolCallBlock(tool_call_id="call_1", tool_name="add", tool_kwargs={"a": 2, "b": 3})
        result = ChatMessage(role="tool", blocks=[TextBlock(text="5")], additional_kwargs={"tool_call_id": "call_1"})
        prompts = []
        for blocks, more in (([block], {}), ([], {"tool_calls": [call]}), ([block], {"tool_calls": [call]})):
            message = ChatMessage(role="assistant", blocks=blocks, additional_kwargs=more)
            response = llm.chat([ChatMessage(content=ASK), message, result], max_tokens=1)
            prompts.append(usage(response)["prompt_tokens"])
        assert len(set(prompts)) == 1
        nothing = llm.chat([ChatMessage(content=ASK), ChatMessage(role="assistant", content=""), result], max_tokens=1)
        assert usage(nothing)["prompt_tokens"] < prompts[0]

    # ---------------------------------------------------------------- bad input

    @pytest.mark.parametrize(
        "tool",
        [
            {"type": "function", "function": {"description": "No name."}},
            {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "properties": 3}}},
            {"type": "function", "function": {"name": "odd", "parameters": "none"}},
            "add",
        ],
    )
    def test_a_broken_tool_is_named_and_the_next_call_is_served(self, llm: FunctionCallingLLM, tool: Any) -> None:
        for call in (llm.chat, llm.stream_chat):
            with pytest.raises(ValueError, match="tool"):
                call([ChatMessage(content=ASK)], tools=[tool])
        self.check_one_call(llm, llm.chat_with_tools(TOOLS, user_msg=ASK, tool_required=True))

    def test_an_unknown_tool_choice_is_named(self, llm: FunctionCallingLLM) -> None:
        with pytest.raises(ValueError, match="subtract"):
            llm.chat_with_tools(TOOLS, user_msg=ASK, tool_choice="subtract")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Wheel(BaseModel):
    size: int = Field(ge=10, le=30)
    brand: str = Field(max_length=8)


class Bicycle(BaseModel):
    """A bicycle."""

    name: str = Field(max_length=12)
    code: str = Field(pattern=r"^[A-Z]{2}-[0-9]{3}$")
    colour: Colour
    wheels: list[Wheel] = Field(min_length=1, max_length=2)
    bell: bool
    price: int | None = Field(ge=0, le=999)


class Answer(BaseModel):
    word: Literal["yes", "no"]
    sure: bool


PLEASE = PromptTemplate("Describe a bicycle for {who}.")


class StructuredContract:
    """structured_predict and its twins, StructuredLLM, programs: every answer is an instance."""

    @pytest.fixture
    def llm(self) -> FunctionCallingLLM:
        """A fresh object for each test; `max_tokens` must have room for a Bicycle (300)."""
        raise NotImplementedError

    def requests_open(self, llm: Any) -> int:
        raise NotImplementedError

    def test_structured_predict(self, llm: FunctionCallingLLM) -> None:
        with recorded(llm) as calls:
            made = llm.structured_predict(Bicycle, PLEASE, who="a child")
        assert type(made) is Bicycle
        self.check_events(calls, made, pieces=0)

    async def test_astructured_predict(self, llm: FunctionCallingLLM) -> None:
        with recorded(llm) as calls:
            made = await llm.astructured_predict(Bicycle, PLEASE, who="a child")
        assert type(made) is Bicycle
        self.check_events(calls, made, pieces=0)

    def test_stream_structured_predict(self, llm: FunctionCallingLLM) -> None:
        with recorded(llm) as calls:
            parts = list(llm.stream_structured_predict(Bicycle, PLEASE, who="a child"))
        self.check_parts(parts)
        self.check_events(calls, parts[-1], pieces=len(parts))

    async def test_astream_structured_predict(self, llm: FunctionCallingLLM) -> None:
        with recorded(llm) as calls:
            stream = await llm.astream_structured_predict(Bicycle, PLEASE, who="a child")
            parts = [part async for part in stream]
        self.check_parts(parts)
        self.check_events(calls, parts[-1], pieces=len(parts))

    def check_parts(self, parts: list[Any]) -> None:
        assert len(parts) > 3
        assert type(parts[-1]) is Bicycle
        dumped = [part.model_dump(exclude_none=True) for part in parts]
        for earlier, later in pairwise(dumped):
            assert set(earlier) <= set(later) <= set(Bicycle.model_fields) or later == dumped[-1]

    def check_events(self, calls: Any, made: Any, pieces: int) -> None:
        for name, count in (("Start", 1), ("InProgress", pieces), ("End", 1)):
            assert len(calls.named(f"LLMStructuredPredict{name}Event")) == count, name
        assert calls.named("LLMStructuredPredictEndEvent")[0].output == made
        assert len(calls.named("LLMChatStartEvent")) == len(calls.named("LLMChatEndEvent")) == 1

    def test_what_the_call_and_the_object_say_reaches_the_model(self, llm: FunctionCallingLLM) -> None:
        llm.system_prompt = "You sell bicycles."
        with recorded(llm) as calls:
            llm.structured_predict(Answer, PLEASE, llm_kwargs={"temperature": 1.5, "seed": 7}, who="a child")
        (start,) = calls.named("LLMChatStartEvent")
        assert start.messages[0].content == "You sell bicycles."
        assert "a child" in start.messages[-1].content
        assert start.additional_kwargs["seed"] == 7

    @pytest.mark.parametrize("seed", range(6))
    def test_hot_answers_are_instances_too(self, llm: FunctionCallingLLM, seed: int) -> None:
        hot = {"temperature": 1.0, "seed": seed}
        assert type(llm.structured_predict(Bicycle, PLEASE, llm_kwargs=hot, who="a clown")) is Bicycle

    def test_a_structured_llm(self, llm: FunctionCallingLLM) -> None:
        structured = llm.as_structured_llm(Answer)
        for response in (structured.chat([ChatMessage(content="Is water wet?")]), structured.complete("Is water wet?")):
            assert type(response.raw) is Answer
        text = structured.chat([ChatMessage(content="Is {water} wet?")]).message.content
        assert Answer.model_validate_json(text or "")
        last = list(structured.stream_chat([ChatMessage(content="Is water wet?")]))[-1]
        assert type(last.raw) is Answer

    async def test_a_structured_llm_async(self, llm: FunctionCallingLLM) -> None:
        structured = llm.as_structured_llm(Answer)
        response = await structured.achat([ChatMessage(content="Is water wet?")])
        assert type(response.raw) is Answer
        pieces = [piece async for piece in await structured.astream_chat([ChatMessage(content="Is water wet?")])]
        assert type(pieces[-1].raw) is Answer

    def test_a_chat_prompt(self, llm: FunctionCallingLLM) -> None:
        messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(content="Is {thing} wet?")]
        assert (
            type(llm.structured_predict(Answer, ChatPromptTemplate(message_templates=messages), thing="ice")) is Answer
        )

    def test_by_a_tool(self, llm: FunctionCallingLLM) -> None:
        """The way that LlamaIndex takes by itself for a class that calls functions."""
        program = FunctionCallingProgram.from_defaults(Bicycle, prompt=PLEASE, llm=llm)
        assert type(program(who="a child")) is Bicycle
        llm.pydantic_program_mode = PydanticProgramMode.FUNCTION
        assert type(llm.structured_predict(Answer, PLEASE, who="a child")) is Answer

    def test_an_output_that_was_cut_names_max_tokens(self, llm: FunctionCallingLLM) -> None:
        cut = {"max_tokens": 3}
        with pytest.raises(ValueError, match="max_tokens"):
            llm.structured_predict(Bicycle, PLEASE, llm_kwargs=cut, who="a child")
        with pytest.raises(ValueError, match="max_tokens"):
            list(llm.stream_structured_predict(Bicycle, PLEASE, llm_kwargs=cut, who="a child"))

    def test_leaving_a_stream_ends_its_request(self, llm: FunctionCallingLLM) -> None:
        class Story(BaseModel):
            text: str = Field(min_length=20_000)

        stream = llm.stream_structured_predict(
            Story, PLEASE, llm_kwargs={"max_tokens": LONG["max_tokens"]}, who="a child"
        )
        next(stream)
        assert self.requests_open(llm) == 1
        stream.close()
        deadline = time.monotonic() + 10
        while self.requests_open(llm):
            assert time.monotonic() < deadline
