"""schemathesis: requests made from schemas, ours and OpenAI's published one. Whatever comes, no answer is a 5xx, and
every refusal has OpenAI's shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from serving_helpers import InProcess

pytestmark = pytest.mark.slow
PUBLISHED = Path("/work/shared/openai/openapi.json")
EXAMPLES = settings(
    max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"]


REQUIRED = ("messages", "prompt", "input", "tokens")


def check(tiny: InProcess, case: Any) -> None:
    """The case as it is; then, as long as a field is refused that may be left out, without that field."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(case.body.get(name), int) and case.body[name] > 4:
                case.body[name] = 4  # a good request should end soon
        if isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
    for _ in range(8):
        reply = case.call(base_url=tiny.url, timeout=30)
        assert reply.status_code < 500, reply.text
        assert reply.elapsed < 10
        if reply.status_code < 400:
            return
        error = json.loads(reply.text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        name = str(error["param"]).split(".")[0]
        if not isinstance(case.body, dict) or name in REQUIRED or name not in case.body:
            return
        del case.body[name]


@pytest.mark.parametrize("path", PATHS)
def test_our_own_schema(tiny: InProcess, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{tiny.url}/openapi.json")

    @EXAMPLES
    @given(case=schema[path]["POST"].as_strategy())
    def run(case: Any) -> None:
        check(tiny, case)

    run()
    assert tiny.idle()


def test_every_path_of_ours_is_in_the_schema(tiny: InProcess) -> None:
    schema = schemathesis.openapi.from_url(f"{tiny.url}/openapi.json")
    assert {*PATHS, "/v1/models", "/v1/models/{name}", "/health", "/ready", "/version"} <= set(schema)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs OpenAI's published schema (openapi.json)")
@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/responses", "/embeddings"])
def test_the_published_schema(tiny: InProcess, path: str) -> None:
    document = json.loads(PUBLISHED.read_text())
    document["paths"] = {f"/v1{path}": {"post": document["paths"][path]["post"]}}
    document["servers"] = []
    schema = schemathesis.openapi.from_dict(document)

    @EXAMPLES
    @given(case=schema[f"/v1{path}"]["POST"].as_strategy())
    def run(case: Any) -> None:
        check(tiny, case)

    run()
    assert tiny.idle()
