"""Texts that a caller gives as a batch, checked. Used by embeddings and translation."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.errors import RequestError


def checked_texts(texts: object) -> list[str]:
    """One text or several, as a list. Raises `RequestError` (field "texts")."""
    batch = [texts] if isinstance(texts, str) else texts
    if isinstance(batch, bytes) or not isinstance(batch, Sequence):
        raise RequestError(f"texts must be a string or a list of strings, not {type(texts).__name__}", "texts")
    for place, text in enumerate(batch):
        if not isinstance(text, str):
            raise RequestError(f"text {place} is a {type(text).__name__}, not a string", "texts")
        try:
            text.encode()
        except UnicodeError as error:
            raise RequestError(f"text {place} has surrogates, which are no text", "texts") from error
    return list(batch)
