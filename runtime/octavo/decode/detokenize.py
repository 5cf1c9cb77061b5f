"""From token ids to text as they arrive. One `Detokenizer` per sequence; called on the consumer's side of a request.

A token is often only part of a character, so text is handed out when it is certain, never a U+FFFD too early. Each
token costs the same, however long the sequence is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

# Enough context for any decoder: what a token's text depends on (a leading space, a byte run) lies just before it.
_CONTEXT = 6
# A character has at most four bytes, hence at most four tokens. Whoever waits longer waits for nothing.
_PATIENCE = 4


class Detokenizer:
    """Text of a growing sequence. The pieces of `push` and the rest from `flush` join to the decoding of all ids.

    Args:
        tokenizer: the tokenizer that made the ids.
        prompt_ids: what came before; it decides whether a first leading space belongs to the text.
        skip_special_tokens: leave control tokens out of the text.

    For byte-level tokenizers the join is exact for any ids whatever. For byte-fallback (sentencepiece) tokenizers it is
    exact for valid text; they decode a broken run of bytes as a whole, which a stream cannot foresee.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._special = tokenizer.special_ids if skip_special_tokens else frozenset()
        context = [token for token in prompt_ids[-4 * _CONTEXT :] if token not in self._special][-_CONTEXT:]
        self._utf8: codecs.IncrementalDecoder | None = None
        if tokenizer.is_byte_level:
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
            for token in context:  # a prompt may end inside a character
                self._utf8.decode(tokenizer.token_bytes(token))
        # the other tokenizers: `_window` is the context and the tokens not yet handed out
        self._window = context
        self._shown = tokenizer.decode(context, skip_special_tokens) if context and self._utf8 is None else ""
        self._shown_ids = len(context)

    def push(self, ids: Sequence[int]) -> str:
        """Append `ids`; returns the text that they settle, which may be empty."""
        special = self._special
        if self._utf8 is not None:
            read = self._tokenizer.token_bytes
            return self._utf8.decode(b"".join(read(token) for token in ids if token not in special))
        return "".join(self._step(token) for token in ids if token not in special)

    def flush(self) -> str:
        """The text held back, once no more ids will come. An unfinished character becomes U+FFFD."""
        if self._utf8 is not None:
            rest = self._utf8.decode(b"", True)
            self._utf8.reset()
            return rest
        return self._settle(self._tokenizer.decode(self._window, self._skip))

    def _step(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window, self._skip)
        held = len(self._window) - self._shown_ids
        if held < _PATIENCE and (text.endswith("\ufffd") or len(text) <= len(self._shown)):
            return ""
        return self._settle(text)

    def _settle(self, text: str) -> str:
        """Hand out what `text`, the decoding of the window, has beyond what was shown, and move the window on."""
        piece = text[len(self._shown) :]
        if self._shown_ids:  # the context before the last settled tokens has done its service
            del self._window[: max(len(self._window) - _CONTEXT, 0)]
        self._shown_ids = len(self._window)
        self._shown = self._tokenizer.decode(self._window, self._skip)
        return piece
