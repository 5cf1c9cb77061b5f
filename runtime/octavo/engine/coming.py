"""Which blocks of their prompts the running sequences are filling: what a waiting one would compute again. Asked by the
scheduler, so that of requests which come at once with one long prefix only one computes it."""

from __future__ import annotations

from octavo.engine.blocks import BlockPool, block_key
from octavo.engine.request import Sequence


class ComingBlocks:
    """Knows of each running sequence the key of the block that it fills next, as long as that is of its prompt."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._by_key: dict[bytes, Sequence] = {}

    def announce(self, sequence: Sequence) -> None:
        """A sequence got its row, or some of its blocks became findable."""
        self.withdraw(sequence)
        index = len(sequence.block_keys)
        if self._pool.caching and (index + 1) * self._pool.block_size <= sequence.num_prompt:
            sequence.coming_key = self._key(sequence, sequence.block_keys)
            self._by_key[sequence.coming_key] = sequence

    def withdraw(self, sequence: Sequence) -> None:
        """It left its row."""
        self._by_key.pop(sequence.coming_key, None)
        sequence.coming_key = b""

    def would_help(self, sequence: Sequence) -> bool:
        """The first whole block that this sequence lacks is being filled."""
        if not self._by_key:
            return False
        _, keys = self._pool.match(sequence.tokens, sequence.request.cache_salt, sequence.length - 1)
        whole = (len(keys) + 1) * self._pool.block_size < sequence.length
        return whole and self._key(sequence, keys) in self._by_key

    def _key(self, sequence: Sequence, keys: list[bytes]) -> bytes:
        """Of the block that follows those with these keys."""
        start, size = len(keys) * self._pool.block_size, self._pool.block_size
        parent = keys[-1] if keys else b""
        return block_key(parent, sequence.tokens[start : start + size], sequence.request.cache_salt)
