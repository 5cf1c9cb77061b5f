"""Questions to a real document, by LlamaIndex and by LangChain, as a user's program would ask them; started by
`test_rag.py` in processes of its own, first with "build", then with "ask", as after a restart. Prints one JSON object.

The database is Chroma: LangChain and LlamaIndex both keep a package for it, it installs from wheels and runs
in the process. (LanceDB has fewer dependencies, but LangChain's class for it lies in langchain-community, which is
being given up.)

No name is ever looked up: whoever tries gets an error and is named in the output.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

LOOKED_UP: list[str] = []


def _refuse(host: Any, *args: Any, **kwargs: Any) -> Any:
    LOOKED_UP.append(str(host))
    raise OSError(f"this program must not look up {host!r}")


for _name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, _name, _refuse)

import chromadb  # noqa: E402
from langchain_chroma import Chroma  # noqa: E402
from langchain_core.documents import Document as Page  # noqa: E402
from langchain_core.output_parsers import StrOutputParser  # noqa: E402
from langchain_core.prompts import ChatPromptTemplate  # noqa: E402
from langchain_core.runnables import RunnablePassthrough  # noqa: E402
from langchain_octavo import ChatOctavo, OctavoEmbeddings  # noqa: E402
from llama_index.core import Document, StorageContext, VectorStoreIndex  # noqa: E402
from llama_index.core.agent.workflow import FunctionAgent  # noqa: E402
from llama_index.core.tools import FunctionTool  # noqa: E402
from llama_index.embeddings.octavo import OctavoEmbedding  # noqa: E402
from llama_index.llms.octavo import Octavo  # noqa: E402
from llama_index.vector_stores.chroma import ChromaVectorStore  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "benchmarks" / "data" / "us-constitution.txt"
QUESTION = "How old must a person be to become a Senator?"


def paragraphs() -> list[str]:
    """The first 60 paragraphs of the Constitution of the United States that have more than a heading in them."""
    found = [" ".join(part.split()) for part in DOCUMENT.read_text().split("\n\n")]
    return [part for part in found if len(part) > 120][:60]


def client_of(folder: Path) -> Any:
    return chromadb.PersistentClient(str(folder), settings=chromadb.Settings(anonymized_telemetry=False))


def build(folder: Path) -> dict[str, Any]:
    client = client_of(folder)
    collection = client.create_collection("llama_index")
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    embedding = OctavoEmbedding()
    VectorStoreIndex.from_documents(
        [Document(text=text) for text in paragraphs()], storage_context=storage, embed_model=embedding
    )
    store = Chroma("langchain", OctavoEmbeddings(), client=client)
    store.add_documents([Page(text, metadata={"number": number}) for number, text in enumerate(paragraphs())])
    return {"steps": embedding._shared.llm.stats().steps, "kept": [collection.count(), len(store.get()["ids"])]}


def ask(folder: Path) -> dict[str, Any]:
    client, found = client_of(folder), {}
    embedding, llm = OctavoEmbedding(), Octavo(temperature=0, max_tokens=24)
    vectors = ChromaVectorStore(chroma_collection=client.get_collection("llama_index"))
    index = VectorStoreIndex.from_vector_store(vectors, embed_model=embedding)
    found["steps before a question"] = embedding._shared.llm.stats().steps

    streamed = index.as_query_engine(llm=llm, streaming=True, similarity_top_k=2).query(QUESTION)
    found["pieces"] = len(list(streamed.response_gen))
    found["source"] = streamed.source_nodes[0].text

    chat = index.as_chat_engine(chat_mode="context", llm=llm, similarity_top_k=1)
    chat.chat(QUESTION)
    found["answer"] = chat.chat("And how long does one serve?").response
    found["history"] = [message.role.value for message in chat.chat_history]

    asked: list[str] = []

    def constitution(question: str) -> str:
        """Look up what the Constitution of the United States says."""
        asked.append(question)
        return index.as_retriever(similarity_top_k=1).retrieve(question)[0].text[:300]

    agent = FunctionAgent(tools=[FunctionTool.from_defaults(constitution)], llm=llm, initial_tool_choice="constitution")

    async def run_agent() -> str:
        return str(await agent.run("Ask the constitution who elects the President."))

    found["agent"], found["asked"] = asyncio.run(run_agent()), len(asked)

    model = ChatOctavo(temperature=0, max_tokens=24)
    retriever = Chroma("langchain", OctavoEmbeddings(), client=client).as_retriever(search_kwargs={"k": 2})
    prompt = ChatPromptTemplate.from_template("Answer from this text:\n{context}\n\nQuestion: {question}")
    context = retriever | (lambda pages: "\n".join(page.page_content[:400] for page in pages))
    chain = {"context": context, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()
    found["chunks"] = len(list(chain.stream(QUESTION)))
    found["page"] = retriever.invoke(QUESTION)[0].page_content
    found["one engine"] = model._shared().llm.engine is llm.engine.engine
    found["steps"] = embedding._shared.llm.stats().steps
    return found


if __name__ == "__main__":
    result = {"build": build, "ask": ask}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({**result, "looked up": LOOKED_UP}))
