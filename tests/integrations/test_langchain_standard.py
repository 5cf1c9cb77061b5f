"""LangChain's own suites for chat models, over `ChatOctavo` and the default model, with every flag that a model of text
can have switched on. Skipped are images, audio, PDF and Anthropic's inputs, and what needs recorded HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_octavo import ChatOctavo
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from octavo.execute.build import cpu_multiplies_bfloat16


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatOctavo]:
        return ChatOctavo

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 0}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"LC_OUTPUT_VERSION": "v1"}, {}, {"output_version": "v1"}


@pytest.fixture(scope="module")
def keeper() -> Any:
    """Keeps the engine between tests."""
    chat = ChatOctavo()
    yield chat
    chat.close()


@pytest.mark.usefixtures("keeper")
class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatOctavo]:
        return ChatOctavo

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": 120}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def enable_vcr_tests(self) -> bool:
        return True  # the time of a stream; there is no traffic to record

    @property
    def supported_usage_metadata_details(self) -> dict[str, Any]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    @pytest.fixture(autouse=True)
    def _other_model(self, default_model: Path) -> None:
        self._path = default_model

    @property
    def model_override_value(self) -> str:
        """The same model by another name."""
        return str(self._path)

    @pytest.mark.xfail(
        not cpu_multiplies_bfloat16(), strict=False,
        reason="whether to call a tool is the model's choice here; in float32 this one answers by itself",
    )  # fmt: skip
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        chat = ChatOctavo(temperature=0, max_tokens=4)
        long = "Count with me. " + " ".join(str(number) for number in range(200))
        chat.invoke(long)
        if not stream:
            return chat.invoke(long)
        chunks = list(chat.stream(long))
        return sum(chunks[1:], chunks[0])  # type: ignore[return-value]
