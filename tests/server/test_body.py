"""Bodies as JSON: what is counted, and that text may hold whatever it likes."""

from __future__ import annotations

import json

import pytest
from octavo.server.body import MAX_VALUES, parse_json
from octavo.server.errors import ApiError

MANY = MAX_VALUES + 10


@pytest.mark.parametrize("text", ["," * MANY, "[{" * MANY, '",' * MANY, '\\",[' * MANY, "\\" * MANY + "[" * MANY])
def test_marks_in_text_are_text(text: str) -> None:
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@pytest.mark.parametrize(
    "value", [[1] * MANY, [[]] * MANY, ["a,"] * MANY, ['\\"'] * MANY, {str(n): 1 for n in range(MANY)}]
)
def test_many_values_are_refused(value: object) -> None:
    with pytest.raises(ApiError, match="values"):
        parse_json(json.dumps({"prompt": value}).encode())


def test_as_many_as_there_may_be() -> None:
    ids = [7] * (MAX_VALUES - 10)
    assert parse_json(json.dumps({"prompt": ids}).encode()) == {"prompt": ids}
