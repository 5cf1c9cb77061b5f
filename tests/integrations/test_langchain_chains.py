"""What people build with LangChain, on one engine: LLMChain, LCEL, an agent with real tools, a retriever, a history."""

from __future__ import annotations

import ast
import asyncio
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest
from langchain_classic.chains import LLMChain
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableGenerator, RunnableParallel, RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import ToolException, tool
from langchain_octavo import ChatOctavo, OctavoLLM
from langchain_recorder import Recorder, at_rest
from octavo.engine import registry
from pydantic import BaseModel


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatOctavo]:
    chat = ChatOctavo(temperature=0, max_tokens=40)
    yield chat
    assert at_rest(chat.stats())
    chat.close()


# -- LLMChain --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The class `LLMChain` was deprecated", "ignore:The method `Chain")
@pytest.mark.parametrize("kind", [ChatOctavo, OctavoLLM])
def test_llm_chain(chat: ChatOctavo, kind: Any) -> None:
    model = kind(temperature=0, max_tokens=12)
    chain = LLMChain(llm=model, prompt=PromptTemplate.from_template("A word about {thing}:"))
    inputs = [{"thing": thing} for thing in ("tea", "rain", "stone", "light", "salt", "paper")]
    steps = model.stats().steps
    many = [output["text"] for output in chain.apply(inputs)]
    assert model.stats().steps - steps < 30, "they ran one after another"
    assert all(many)
    assert chain.invoke(inputs[1])["text"] == chain.predict(thing="rain") == many[1]
    assert asyncio.run(chain.ainvoke(inputs[2]))["text"] == many[2]
    assert len([config for config in registry.running() if config.model == model.model]) == 1


# -- LCEL ------------------------------------------------------------------------------------------------------------


def test_lcel(chat: ChatOctavo) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Answer in one word."), ("human", "{question}")])
    chain = prompt | chat | StrOutputParser()
    question = {"question": "What colour is the sky?"}
    answer = chain.invoke(question)
    assert answer
    pieces = list(chain.stream(question))
    assert len(pieces) > 1
    assert "".join(pieces) == answer
    assert chain.batch([question] * 3) == [answer] * 3

    async def read() -> list[str]:
        return [piece async for piece in chain.astream(question)]

    assert "".join(asyncio.run(read())) == answer
    both = RunnableParallel(chat=chain, text=PromptTemplate.from_template("{question}") | OctavoLLM(max_tokens=4))
    assert set(both.invoke(question)) == {"chat", "text"}
    fallback = (prompt | chat.bind(max_tokens=-1)).with_fallbacks([prompt | chat])
    assert fallback.invoke(question).content == answer


def test_leaving_a_chain_ends_its_request(chat: ChatOctavo) -> None:
    long = chat.bind(max_tokens=2000, ignore_eos=True)
    for steps in (
        [],
        [StrOutputParser()],
        [StrOutputParser(), RunnableGenerator(in_capitals)],
        [RunnableGenerator(first_three)],
    ):
        chain: Any = ChatPromptTemplate.from_template("{text}") | long
        for step in steps:
            chain = chain | step
        before = chat.stats().steps
        for number, _ in enumerate(chain.stream({"text": "Count to a thousand."})):
            if number == 5:
                break
        after = chat.stats()
        assert at_rest(after)
        assert after.steps - before < 100, f"{steps} read on to the end"

    async def leave() -> None:
        async for _ in (ChatPromptTemplate.from_template("{text}") | long | StrOutputParser()).astream({"text": "Go."}):
            break

    asyncio.run(leave())
    assert at_rest(chat.stats())


def in_capitals(chunks: Iterator[str]) -> Iterator[str]:
    for chunk in chunks:
        yield chunk.upper()


def first_three(chunks: Iterator[Any]) -> Iterator[str]:
    for _, chunk in zip(range(3), chunks, strict=False):
        yield chunk.text


# -- an agent with real tools ----------------------------------------------------------------------------------------

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
}  # fmt: skip
ran: list[dict[str, Any]] = []


@tool
def calculate(left: int, operation: str, right: int) -> str:
    """Calculate with two whole numbers. operation: one of + - *"""
    ran.append({"left": left, "right": right})
    tree = ast.parse(f"1 {operation if operation in '+-*' and operation else '+'} 1", mode="eval").body
    assert isinstance(tree, ast.BinOp)
    return str(OPERATORS[type(tree.op)](left, right))


@tool
def fails(text: str) -> str:
    """Look something up."""
    raise ToolException(len(text) + "letters")  # type: ignore[operator]


class FirstATool(AgentMiddleware[Any, Any]):
    """A small model may not see by itself that it should call: the first answer must be a call, the next must not."""

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[..., Any]) -> Any:
        answered = isinstance(request.messages[-1], ToolMessage)
        return handler(request.override(tool_choice="none" if answered else "any"))

    async def awrap_model_call(self, request: ModelRequest[Any], handler: Callable[..., Any]) -> Any:
        answered = isinstance(request.messages[-1], ToolMessage)
        return await handler(request.override(tool_choice="none" if answered else "any"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_agent_calls_a_tool_and_answers(chat: ChatOctavo, asynchronous: bool) -> None:
    agent = create_agent(chat, [calculate], middleware=[FirstATool()], system_prompt="You can calculate.")
    ran.clear()
    question = {"messages": [HumanMessage("What is 17 + 25?")]}
    state = asyncio.run(agent.ainvoke(question)) if asynchronous else agent.invoke(question)  # type: ignore[arg-type]
    asked, call, result, answer = state["messages"]
    assert asked.content == "What is 17 + 25?"
    assert isinstance(call, AIMessage)
    (made,) = call.tool_calls
    assert [{"left": made["args"]["left"], "right": made["args"]["right"]}] == ran
    assert isinstance(result, ToolMessage)
    assert result.tool_call_id == made["id"]
    assert answer.content
    assert not answer.tool_calls


def test_an_agent_streams_tokens_and_calls(chat: ChatOctavo) -> None:
    agent = create_agent(chat, [calculate], middleware=[FirstATool()])
    recorder = Recorder()
    chunks = [
        chunk
        for chunk, _ in agent.stream(
            {"messages": [HumanMessage("What is 2 * 3?")]}, {"callbacks": [recorder]}, stream_mode="messages"
        )
    ]
    said = [chunk for chunk in chunks if isinstance(chunk, AIMessageChunk)]
    assert sum(bool(chunk.tool_call_chunks) for chunk in said) > 3
    assert sum(bool(chunk.content) for chunk in said) > 1
    assert recorder.counts["token"] == len(said)
    assert recorder.counts["start"] == recorder.counts["end"] == 2


def test_an_agent_with_a_form_for_its_answer(chat: ChatOctavo) -> None:
    class Result(BaseModel):
        number: int
        certain: bool

    agent = create_agent(chat, [], response_format=Result)
    state = agent.invoke({"messages": [HumanMessage("How many legs has a spider?")]})
    assert isinstance(state["structured_response"], Result)


def test_an_error_inside_a_tool_is_the_tools(chat: ChatOctavo) -> None:
    agent = create_agent(chat, [fails], middleware=[FirstATool()])
    with pytest.raises(TypeError, match="unsupported operand"):
        agent.invoke({"messages": [HumanMessage("Look up tea.")]})
    assert chat.invoke("Hello").content, "the engine serves the next call"


# -- retriever and history -------------------------------------------------------------------------------------------

DOCUMENTS = [
    "The mill at Holm was built in 1843 and grinds barley.",
    "The ferry to Aker leaves at noon, except on Sundays.",
    "The bakery of the village sells rye bread from six in the morning.",
]


class WordRetriever(BaseRetriever):
    """Documents by the words that they share with the question."""

    texts: list[str]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        words = set(query.lower().strip("?").split())
        ranked = sorted(self.texts, key=lambda text: -len(words & set(text.lower().strip(".").split())))
        return [Document(text) for text in ranked[:1]]


def test_a_retriever_gives_the_context(chat: ChatOctavo) -> None:
    recorder = Recorder()
    seen: list[str] = []

    def joined(documents: list[Document]) -> str:
        seen.extend(document.page_content for document in documents)
        return "\n".join(seen)

    prompt = ChatPromptTemplate.from_template("Use this: {context}\nQuestion: {question}")
    found = {"context": WordRetriever(texts=DOCUMENTS) | joined, "question": RunnablePassthrough()}
    chain = found | prompt | chat | StrOutputParser()
    assert chain.invoke("When leaves the ferry to Aker?", {"callbacks": [recorder]})
    assert seen == [DOCUMENTS[1]]
    (end,) = recorder.ends.values()
    usage = end.generations[0][0].message.usage_metadata
    assert usage["input_tokens"] > chat.get_num_tokens(DOCUMENTS[1])


@pytest.mark.filterwarnings("ignore:.*RunnableWithMessageHistory", "ignore:.*InMemoryChatMessageHistory")
def test_a_history_is_remembered_and_found_in_the_cache(chat: ChatOctavo) -> None:
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{input}")])
    kept: dict[str, InMemoryChatMessageHistory] = {}

    def history(session_id: str) -> InMemoryChatMessageHistory:
        return kept.setdefault(session_id, InMemoryChatMessageHistory())

    chain = RunnableWithMessageHistory(
        prompt | chat, history, input_messages_key="input", history_messages_key="history"
    )
    config: Any = {"configurable": {"session_id": "a"}}
    long = "My name is Ada and these are my words: " + "one two three four five six " * 20
    first = chain.invoke({"input": long}, config)
    second = chain.invoke({"input": "What is my name?"}, config)
    assert [type(message) for message in kept["a"].messages] == [HumanMessage, AIMessage] * 2
    assert second.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]
    assert second.usage_metadata["input_token_details"]["cache_read"] >= 96, "the first turn was not computed again"
    other = chain.invoke({"input": "What is my name?"}, {"configurable": {"session_id": "b"}})
    assert other.usage_metadata["input_tokens"] < 60
