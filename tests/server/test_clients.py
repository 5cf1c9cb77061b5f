"""Clients of OpenAI's API that know nothing of this server, over HTTP on the default model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving_helpers import CHAT, EMBEDDER, Program

QUESTION = "What is the capital of France?"


def test_vllm_openai_of_langchain_community(server: Program) -> None:
    from langchain_community.llms import VLLMOpenAI

    llm = VLLMOpenAI(
        openai_api_key="EMPTY", openai_api_base=server.v1, model_name=CHAT, model_kwargs={"stop": ["."]},
        temperature=0, max_tokens=16,
    )  # fmt: skip
    whole = llm.invoke("The capital of France is")
    assert "Paris" in whole
    assert "." not in whole
    assert "".join(llm.stream("The capital of France is")) == whole
    generations = llm.generate(["The capital of France is", "The capital of Italy is"]).generations
    assert [len(each) for each in generations] == [1, 1]
    assert generations[0][0].text == whole


def test_chat_openai_of_langchain(server: Program) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        country: str

    chat = ChatOpenAI(base_url=server.v1, api_key="EMPTY", model=CHAT, temperature=0, max_tokens=60)
    answer = chat.invoke(QUESTION)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    for method in ("json_schema", "function_calling"):
        city = chat.with_structured_output(City, method=method).invoke("Paris is the capital of France.")
        assert isinstance(city, City)


def test_embeddings_of_langchain(server: Program) -> None:
    from langchain_openai import OpenAIEmbeddings

    found = OpenAIEmbeddings(
        base_url=server.v1, api_key="EMPTY", model=EMBEDDER, check_embedding_ctx_length=False
    ).embed_documents(["a cat", "a kitten", "the stock market"])
    near, far = (sum(a * b for a, b in zip(found[0], other, strict=True)) for other in found[1:])
    assert near > far + 0.2


def test_openai_like_of_llama_index(server: Program) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(api_base=server.v1, api_key="EMPTY", model=CHAT, is_chat_model=True, temperature=0, max_tokens=16)
    whole = llm.chat([ChatMessage(role="user", content=QUESTION)]).message.content
    assert whole
    *_, last = llm.stream_chat([ChatMessage(role="user", content=QUESTION)])
    assert last.message.content == whole
    plain = OpenAILike(api_base=server.v1, api_key="EMPTY", model=CHAT, temperature=0, max_tokens=8)
    assert "Paris" in plain.complete("The capital of France is").text


def test_litellm(server: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    call: dict[str, Any] = {
        "model": f"hosted_vllm/{CHAT}", "api_base": server.v1, "temperature": 0, "max_tokens": 16,
        "messages": [{"role": "user", "content": QUESTION}],
    }  # fmt: skip
    whole = litellm.completion(**call).choices[0].message.content
    assert whole
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**call, stream=True)]
    assert "".join(pieces) == whole
    found = litellm.embedding(model=f"hosted_vllm/{EMBEDDER}", input=["a"], api_base=server.v1)
    assert len(found.data[0]["embedding"]) == 384


TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.slow
def test_lm_eval(server: Program, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "test.json"
    data.write_text("".join(json.dumps({"question": f"{n} + 1 =", "answer": str(n + 1)}) + "\n" for n in range(4)))
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=data))
    url = f"{server.v1}/chat/completions"
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--apply_chat_template",
        "--model_args", f"model={CHAT},base_url={url},num_concurrent=2,tokenized_requests=False",
        "--tasks", "capitals", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    env = {**os.environ, **offline, "OPENAI_API_KEY": "EMPTY"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert results["n-samples"]["capitals"]["effective"] == 4
