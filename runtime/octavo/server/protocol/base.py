"""What all requests have in common: strict types, unknown fields refused, and fields of OpenAI's that are not done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from pydantic_core import PydanticCustomError

Neutral = Mapping[str, tuple[object, ...]]
Number = FiniteFloat
MAX_FIELDS = 256
Short = Annotated[str, Field(max_length=256)]
"""Names, ids, salts."""
Id = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:\-]+$")]
"""Comes back in a header: nothing that could end one."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
"""A prompt. Of a million bad tokens the first is enough."""


class Body(BaseModel):
    """A JSON object of a request. Numbers are numbers, not strings of digits."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    neutral: ClassVar[Neutral] = {}
    """Fields of OpenAI's API whose meaning this server does not have, with the values that ask for nothing: those are
    taken, all others refused. None always is one."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:  # or each would be an error of its own
            raise PydanticCustomError("too_many_fields", "the object has too many fields")
        for name in cls.neutral.keys() & given.keys():
            value = given[name]
            if value is not None and not any(value == one and type(value) is type(one) for one in cls.neutral[name]):
                raise PydanticCustomError("unsupported_field", "leave it out", {"name": name})
        return {name: value for name, value in given.items() if name not in cls.neutral}


class StreamOptions(Body):
    """`stream_options`."""

    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: usage so far in every chunk."""
