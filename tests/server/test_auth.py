"""Keys: every path wants one, and no key sees what another's prompts left in the cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_helpers import InProcess, in_process

KEY, OTHER = "first-key", "second-key"


@pytest.fixture(scope="module")
def locked(tiny_model: Path) -> Iterator[InProcess]:
    with in_process(tiny_model, keys=(KEY, OTHER), num_blocks=128, block_size=16) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def routes(app: Any) -> list[tuple[str, str]]:
    """(method, path) of all that the router knows, and some that it does not."""
    found = []
    for route in app.routes:
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        found += [(method, path) for method in sorted(route.methods or {"GET"})]
    return [*found, ("GET", "/"), ("POST", "/nowhere"), ("GET", "//health"), ("GET", "/health/")]


def test_every_route_wants_a_key(locked: InProcess) -> None:
    known = routes(locked.app)
    assert len(known) > 12
    for method, path in known:
        expected = 401 if path != "/health" else 200 if method == "GET" else 405
        for header in (None, "Bearer wrong", f"Bearer {KEY[:-1]}", "Bearer", KEY, f"Basic {KEY}", "Bearer äää"):
            headers = {} if header is None else {"Authorization": header.encode()}
            reply = httpx.request(method, locked.url + path, headers=headers)
            assert reply.status_code == expected, (method, path, header)
            if reply.status_code == 401 and method != "HEAD":
                assert reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_a_key_opens(locked: InProcess, key: str) -> None:
    assert httpx.get(f"{locked.url}/v1/models", headers=bearer(key)).status_code == 200


def test_the_prefix_cache_is_salted_by_key(locked: InProcess) -> None:
    def cached(key: str, **more: Any) -> int:
        body = {"prompt": list(range(60, 124)), "max_tokens": 1, **more}
        reply = httpx.post(f"{locked.url}/v1/completions", json=body, headers=bearer(key))
        return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEY) == 0
    assert cached(KEY) == 48
    assert cached(OTHER) == 0
    assert cached(OTHER) == 48
    assert cached(OTHER, cache_salt="mine") == 0


def test_another_address_needs_a_key_or_a_word() -> None:
    from octavo.cli.options import UsageProblem
    from octavo.cli.serve import serve

    with pytest.raises(UsageProblem, match="--no-api-key"):
        serve(host="0.0.0.0")
