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

# Enough of a prompt for any decoder: what a token's text depends on lies just before it.
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
        self._special = tokenizer.special_ids if skip_special_tokens else frozenset()
        context = [token for token in prompt_ids[-4 * _CONTEXT :] if token not in self._special][-_CONTEXT:]
        self._steps: _ByteLevel | _ByteFallback | _Window
        if tokenizer.is_byte_level:
            self._steps = _ByteLevel(tokenizer, context)
        elif tokenizer.is_byte_fallback:
            self._steps = _ByteFallback(tokenizer, context)
        else:
            self._steps = _Window(tokenizer, context)

    def push(self, ids: Sequence[int]) -> str:
        """Append `ids`; returns the text that they settle, which may be empty."""
        special, step = self._special, self._steps.step
        return "".join([step(token) for token in ids if token not in special])

    def flush(self) -> str:
        """The text held back, once no more ids will come. An unfinished character becomes U+FFFD."""
        return self._steps.rest()


class _ByteLevel:
    """Decoding is joining the tokens' bytes, so an incremental UTF-8 decoder does all."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in context:  # a prompt may end inside a character
            self._utf8.decode(self._bytes(token))

    def step(self, token: int) -> str:
        return self._utf8.decode(self._bytes(token))

    def rest(self) -> str:
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        return text


class _ByteFallback:
    """Tokens are text, apart from those that are one byte; a leading space of the whole may go."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._piece = tokenizer.fallback_piece
        self._pending = b""
        self._strip = False
        for token in context:
            self.step(token)
        self._strip = tokenizer.strips_first_space and not context

    def step(self, token: int) -> str:
        piece = self._piece(token)
        if isinstance(piece, int):
            self._pending += bytes((piece,))
            try:
                text = self._pending.decode("utf-8")
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return ""
                return self.rest()
            self._pending = b""
        else:
            text = self.rest() + piece if self._pending else piece
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def rest(self) -> str:
        broken, self._pending = "\ufffd" * len(self._pending), b""  # the library counts bytes, not sequences
        self._strip = self._strip and not broken
        return broken


class _Window:
    """Any other decoder: decode the last settled tokens with the new ones, and hand out the difference."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._decode = tokenizer.decode
        self._settled, self._held = context, list[int]()
        self._shown = self._decode(context, False) if context else ""

    def step(self, token: int) -> str:
        self._held.append(token)
        text = self._decode(self._settled + self._held, False)
        undecided = text.endswith("\ufffd") or len(text) <= len(self._shown)
        return "" if undecided and len(self._held) < _PATIENCE else self._settle(text)

    def rest(self) -> str:
        return self._settle(self._decode(self._settled + self._held, False)) if self._held else ""

    def _settle(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._settled, self._held = self._held, []
        self._shown = self._decode(self._settled, False)
        return piece
