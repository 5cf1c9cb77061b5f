"""How an output under a grammar can end soonest. Asked by `grammar.py` when the tokens left become few.

A small model at a high temperature writes strings without end and lists without end; cut at `max_tokens`, they are no
JSON. The library tells which tokens may come next, not which of them lead to an end. So the way out is looked for by
walking: from a copy of the matcher's state, take the token most likely to close something until the grammar is
complete. The way that is found is a way, not always the shortest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from octavo.tokenizer import Tokenizer

LONGEST = 600
"""Tokens of the longest way that is looked for."""
_AGAIN = 3.0
"""How much a byte loses each time it was taken since the last quote: what does not lead on is left for something
else. Brackets, of which many may have to be closed, lose a tenth of it."""


class WaysOut:
    """One for each vocabulary of `vocab_size` tokens. Knows no grammar."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        pieces = [tokenizer.token_bytes(token) for token in range(min(tokenizer.vocab_size, vocab_size))]
        single = {piece[0]: token for token, piece in reversed(list(enumerate(pieces))) if len(piece) == 1}
        self._quote, self._braces = single.get(ord('"')), (single.get(ord("{")), single.get(ord("}")))
        self._bytes = np.array(list(single.values()), dtype=np.int64)
        self._ranks = np.array([_rank(byte) for byte in single], dtype=np.float32)
        self._again = np.array([_AGAIN / 10 if byte in b"}]" else _AGAIN for byte in single], dtype=np.float32)
        thought = [token for token, piece in enumerate(pieces) if piece == b"</think>"]
        self._end_of_thought = thought[0] if thought else None
        self.words = -(-vocab_size // 32)
        self.plain = self.mask_of([token for token, piece in enumerate(pieces) if _is_plain(piece)])
        """[words] int32, a mask: tokens of letters and spaces, which go on with a string and begin nothing."""

    def mask_of(self, tokens: Sequence[int]) -> np.ndarray:
        """[words] int32 with the bits of these tokens."""
        bits = np.zeros(self.words * 32, dtype=np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def find(self, matcher: LLMatcher) -> list[int] | None:
        """Tokens that complete the grammar from here; empty if it may end now; None if no way was found."""
        walk, way = matcher.deep_copy(), list[int]()
        mask = np.empty(self.words, dtype=np.int32)
        lost = np.zeros_like(self._ranks)
        while not walk.is_accepting():
            if len(way) > LONGEST or walk.is_stopped():
                return None
            step = walk.compute_ff_tokens()
            if not step:
                walk.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                token = self._choose(mask, way, lost)
                if token is None:
                    return None
                step = [token]
            if not walk.consume_tokens(step):
                return None
            way += step
        return way

    def first(self, mask: np.ndarray) -> int | None:
        """The token of a mask that leads to an end soonest, by what it looks like."""
        return self._choose(mask, [], np.zeros_like(self._ranks))

    def in_text(self, mask: np.ndarray) -> bool:
        """Both braces may come next, so they mean nothing: in a string without a pattern, or outside JSON."""
        return all(_allows(mask, brace) for brace in self._braces)

    def _choose(self, mask: np.ndarray, way: list[int], lost: np.ndarray) -> int | None:
        if self.in_text(mask):
            if _allows(mask, self._quote) and way[-1:] != [self._quote]:
                return self._quote
            if _allows(mask, self._end_of_thought) and self._end_of_thought not in way:
                return self._end_of_thought
        allowed = mask[self._bytes >> 5] >> (self._bytes & 31) & 1 == 1
        if allowed.any():
            best = int(np.where(allowed, self._ranks + lost, np.inf).argmin())
            token = int(self._bytes[best])
            if token == self._quote:
                lost[:] = 0
            lost[best] += self._again[best]
            return token
        left = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return int(left[0]) if len(left) else None


def _allows(mask: np.ndarray, token: int | None) -> bool:
    return token is not None and bool(mask[token >> 5] >> (token & 31) & 1)


def _rank(byte: int) -> int:
    """Lower goes first: what closes, then the shortest values, then what separates parts of a pattern."""
    character = chr(byte)
    if character in '}]"0n[{,':  # a comma only where nothing can be closed
        return '}]"0n[{,'.index(character)
    if character == "\\" or byte < 32 or byte == 127:
        return 500
    if byte >= 128:
        return 30
    return 12 if character.isdigit() else 14 if character.isalpha() else 20 if character == " " else 10


def _is_plain(piece: bytes) -> bool:
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character.isalpha() or character == " " for character in text)
