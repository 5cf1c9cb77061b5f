"""Suites that test files here inherit from explain their failures as test files do."""

import pytest

pytest.register_assert_rewrite(
    "llama_index_contract", "llama_index_tool_contract", "llama_index_recorder", "base_llm_contract",
    "langchain_recorder",
)  # fmt: skip
