"""How an output under a grammar can end soonest. Asked by `grammar.py` when the tokens left become few.

A small model at a high temperature writes strings without end and lists without end; cut at `max_tokens`, they are no
JSON. The library tells which tokens may come next, not which of them lead to an end. So the way out is looked for by
walking: from a copy of the matcher's state, take the token most likely to close something until the grammar is
complete. The way that is found is a way, not always the shortest.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from octavo.tokenizer import Tokenizer

LONGEST = 600
"""Tokens of the longest way that is looked for."""
_AGAIN = 3
"""How much a byte loses each time it was taken since the last quote: what does not lead on is left for something
else."""


class WaysOut:
    """One for each vocabulary of `vocab_size` tokens. Knows no grammar."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        pieces = [tokenizer.token_bytes(token) for token in range(min(tokenizer.vocab_size, vocab_size))]
        single = {piece[0]: token for token, piece in reversed(list(enumerate(pieces))) if len(piece) == 1}
        self._quote, self._brackets = single.get(ord('"')), (single.get(ord("{")), single.get(ord("}")))
        self._ranked = sorted((_rank(byte), token) for byte, token in single.items())
        thought = [token for token, piece in enumerate(pieces) if piece == b"</think>"]
        self._end_of_thought = thought[0] if thought else None
        self.words = -(-vocab_size // 32)
        plain = np.zeros(self.words * 32, dtype=np.uint8)
        plain[[token for token, piece in enumerate(pieces) if _is_plain(piece)]] = 1
        self.plain = np.packbits(plain, bitorder="little").view(np.int32)
        """[words] int32, a mask: tokens of letters and spaces, which go on with a string and begin nothing."""

    def find(self, matcher: LLMatcher) -> list[int] | None:
        """Tokens that complete the grammar from here; empty if it may end now; None if no way was found."""
        walk, way = matcher.deep_copy(), list[int]()
        mask = np.empty(self.words, dtype=np.int32)
        taken: Counter[int] = Counter()
        while not walk.is_accepting():
            if len(way) > LONGEST or walk.is_stopped():
                return None
            step = walk.compute_ff_tokens()
            if not step:
                walk.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                token = self._choose(mask, way, taken)
                if token is None:
                    return None
                step = [token]
                if token == self._quote:
                    taken.clear()
                taken[token] += 1
            if not walk.consume_tokens(step):
                return None
            way += step
        return way

    def _choose(self, mask: np.ndarray, way: list[int], taken: Counter[int]) -> int | None:
        def allowed(token: int | None) -> bool:
            return token is not None and bool(mask[token >> 5] >> (token & 31) & 1)

        in_text = all(map(allowed, self._brackets))  # where both may come they are text: in a string, or outside JSON
        if in_text and allowed(self._quote) and way[-1:] != [self._quote]:
            return self._quote
        if in_text and allowed(self._end_of_thought) and not taken[self._end_of_thought or 0]:
            return self._end_of_thought
        possible = [(rank + _AGAIN * taken[token], token) for rank, token in self._ranked if allowed(token)]
        if possible:
            return min(possible)[1]
        left = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return int(left[0]) if len(left) else None


def _rank(byte: int) -> int:
    """Lower goes first: what closes, then the shortest values, then what separates parts of a pattern."""
    character = chr(byte)
    if character in '}]"0n[{':
        return '}]"0n[{'.index(character)
    if character in ",\\" or byte < 32 or byte == 127:
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
