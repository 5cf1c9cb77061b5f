"""LangChain's standard tests of chat models over HTTP: `ChatOpenAI`, unmodified, on the default model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from octavo.execute.build import cpu_multiplies_bfloat16
from serving_helpers import CHAT, Program


@pytest.fixture(scope="module")
def address(server: Program) -> str:
    return server.v1


IN_FLOAT32 = pytest.mark.xfail(
    not cpu_multiplies_bfloat16(), strict=False,
    reason="which keys to write, and whether to call a tool, is the model's choice: in float32 another",
)  # fmt: skip


class TestChatOpenAI(ChatModelIntegrationTests):
    address = ""

    @pytest.fixture(autouse=True)
    def _use(self, address: str) -> None:
        type(self).address = address

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "base_url": self.address or "http://127.0.0.1:1/v1", "api_key": "EMPTY", "model": CHAT, "temperature": 0,
            "max_tokens": 80, "stream_usage": True,
        }  # fmt: skip

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "default"

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    @IN_FLOAT32
    def test_json_mode(self, model: BaseChatModel) -> None:
        super().test_json_mode(model)

    @IN_FLOAT32
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        chat = ChatOpenAI(**{**self.chat_model_params, "max_tokens": 4})
        long = "Count with me. " + " ".join(str(number) for number in range(200))
        chat.invoke(long)
        if not stream:
            return chat.invoke(long)  # type: ignore[return-value]
        chunks = list(chat.stream(long))
        return sum(chunks[1:], chunks[0])  # type: ignore[return-value]
