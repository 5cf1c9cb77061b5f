"""`Octavo` of LlamaIndex keeps the contracts of tools and of structured output; thoughts both ways; agents."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.agent.workflow import AgentStream, FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ThinkingBlock
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.octavo import Octavo
from llama_index.llms.octavo.schemas import class_schema, openai_tool
from llama_index_tool_contract import StructuredContract, ToolContract
from octavo import LLM, RequestError

USER = [ChatMessage(role="user", content="Name a colour.")]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[LLM]:
    """The default model stays loaded while this file runs."""
    with LLM() as llm:
        yield llm


def requests_open(llm: Any) -> int:
    stats = llm.engine.stats()
    return int(stats.running + stats.waiting)


class TestTools(ToolContract):
    @pytest.fixture
    def llm(self) -> Octavo:
        return Octavo(max_tokens=200, temperature=0)


class TestStructured(StructuredContract):
    @pytest.fixture
    def llm(self) -> Octavo:
        return Octavo(max_tokens=300, temperature=0)

    def requests_open(self, llm: Any) -> int:
        return requests_open(llm)


# -------------------------------------------------------------------- thoughts

THINKER = """{% for message in messages %}{{ message.role }}: {% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>{% endif %}{{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
"""The template of a model that thinks."""
THOUGHT = {"regex": "<think>\n[a-z ]{30,40}\n</think>\n\n[A-Z][a-z]{10,20}"}


@pytest.fixture
def thinker() -> Octavo:
    """The default model, made to think by a template and a grammar."""
    return Octavo(max_tokens=100, structured_outputs=THOUGHT, additional_kwargs={"chat_template": THINKER})


def check_thought(blocks: list[Any]) -> None:
    thought, text = blocks
    assert isinstance(thought, ThinkingBlock)
    assert isinstance(text, TextBlock)
    assert 20 <= len(thought.content or "") <= 40, "the blanks around it are no part of it"
    assert text.text.isalpha()


async def test_thoughts_become_a_block(thinker: Octavo) -> None:
    check_thought(thinker.chat(USER).message.blocks)
    check_thought((await thinker.achat(USER)).message.blocks)
    completion = thinker.complete("Name a colour.")
    assert completion.text.isalpha()
    assert completion.additional_kwargs["thinking"]


async def test_thoughts_are_streamed_apart(thinker: Octavo) -> None:
    for pieces in (list(thinker.stream_chat(USER)), [piece async for piece in await thinker.astream_chat(USER)]):
        blocks = pieces[-1].message.blocks
        check_thought(blocks)
        assert "".join(piece.additional_kwargs.get("thinking_delta", "") for piece in pieces) == blocks[0].content
        assert "".join(piece.delta or "" for piece in pieces) == blocks[1].text
        assert sum("thinking_delta" in piece.additional_kwargs for piece in pieces) > 1


def test_thoughts_of_earlier_messages_reach_the_template(thinker: Octavo) -> None:
    answer = thinker.chat(USER)
    plain = ChatMessage(role="assistant", content=answer.message.content)
    with_thoughts, without = (
        thinker.chat([*USER, message, *USER]).raw["usage"]["prompt_tokens"] for message in (answer.message, plain)
    )
    assert with_thoughts > without


# -------------------------------------------------------------------- schemas


def test_objects_have_the_members_that_are_named_and_no_others() -> None:
    class Part(BaseModel):
        properties: int
        sizes: dict[str, int]

    class Open(BaseModel, extra="allow"):
        word: str

    class Whole(BaseModel):
        parts: list[Part]
        more: Open
        choice: Part | None = None

    schema = class_schema(Whole)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Part"]["additionalProperties"] is False
    assert schema["$defs"]["Part"]["properties"]["sizes"]["additionalProperties"] == {"type": "integer"}
    assert schema["$defs"]["Open"]["additionalProperties"] is True
    assert set(schema["$defs"]["Part"]["properties"]) == {"properties", "sizes"}
    parameters = openai_tool(FunctionTool.from_defaults(lambda **_: "", name="build", fn_schema=Whole))["function"][
        "parameters"
    ]
    assert parameters["additionalProperties"] is False
    assert parameters["$defs"]["Part"]["additionalProperties"] is False
    as_it_is = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert openai_tool(as_it_is) == as_it_is


# -------------------------------------------------------------------- other grammars


@pytest.mark.parametrize(
    "form", [{"choice": ["red", "blue"]}, {"regex": "red|blue"}, {"grammar": 'start: "red" | "blue"'}]
)
async def test_grammars_by_field_and_by_call(form: dict[str, Any]) -> None:
    assert Octavo(structured_outputs=form).chat(USER).message.content in ("red", "blue")
    assert (await Octavo().acomplete("A colour:", formatted=True, structured_outputs=form)).text in ("red", "blue")


def test_response_format() -> None:
    class Colour(BaseModel):
        name: str = Field(max_length=10)

    schema = {"type": "json_schema", "json_schema": {"name": "colour", "schema": Colour.model_json_schema()}}
    llm = Octavo(max_tokens=60)
    for form in (Colour, schema):
        assert Colour.model_validate_json(llm.chat(USER, response_format=form).message.content or "")
        assert Colour.model_validate_json(llm.complete("Name a colour.", response_format=form).text)


def test_a_schema_that_cannot_be_enforced_is_refused_before_the_first_token() -> None:
    class Odd(BaseModel):
        word: str = Field(json_schema_extra={"pattern": "(?=a)b"})

    llm = Octavo(max_tokens=5)
    with pytest.raises(RequestError):
        llm.structured_predict(Odd, PromptTemplate("A word, please."))
    with pytest.raises(RequestError):
        llm.stream_chat(USER, response_format=Odd)
    assert llm.chat(USER).message.content is not None


# -------------------------------------------------------------------- agents


async def test_an_agent_calls_a_real_tool(loaded: LLM) -> None:
    """The first step must call the tool (`initial_tool_choice`), whose result is the agent's answer."""
    called: list[tuple[int, int]] = []

    async def multiply(a: int, b: int) -> int:
        """The product of two whole numbers."""
        called.append((a, b))
        return a * b

    tool = FunctionTool.from_defaults(async_fn=multiply, return_direct=True)
    agent = FunctionAgent(tools=[tool], llm=Octavo(max_tokens=200, temperature=0), initial_tool_choice="multiply")
    handler = agent.run("What is 6 times 7?")
    events = [event async for event in handler.stream_events()]
    answer = await handler
    ((a, b),) = called
    assert str(answer) == str(a * b)
    (result,) = (event for event in events if isinstance(event, ToolCallResult))
    assert (result.tool_kwargs, result.tool_output.raw_output) == ({"a": a, "b": b}, a * b)
    assert any(event.tool_calls for event in events if isinstance(event, AgentStream))


async def test_an_agent_reads_the_result_of_its_tool(loaded: LLM) -> None:
    """Without `return_direct` the model speaks again, with call and result in its prompt."""

    def capital(country: str) -> str:
        """The capital of a country."""
        return "Oslo"

    agent = FunctionAgent(
        tools=[capital], llm=Octavo(max_tokens=60, temperature=0), initial_tool_choice="capital", streaming=False,
        system_prompt="You answer in one sentence.",
    )  # fmt: skip
    answer = await agent.run("The capital of Norway?", max_iterations=3, early_stopping_method="generate")
    assert answer.tool_calls[0].tool_output.content == "Oslo"
    assert isinstance(answer.response.content, str)


async def test_agents_at_once_join_one_batch(loaded: LLM) -> None:
    def double(number: int) -> int:
        """Twice a number."""
        return 2 * number

    llm = Octavo(max_tokens=100, temperature=0)
    tool = FunctionTool.from_defaults(double, return_direct=True)
    agents = [FunctionAgent(tools=[tool], llm=llm, initial_tool_choice="double") for _ in range(6)]
    answers = await asyncio.gather(*(agent.run(f"What is twice {n}?") for n, agent in enumerate(agents)))
    assert all(int(str(answer)) % 2 == 0 for answer in answers)
    assert loaded.stats().largest_batch >= 3
