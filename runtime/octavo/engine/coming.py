"""Which blocks of their prompts the running sequences are filling: what a waiting one would compute again. Asked by the
scheduler, so that of requests which come at once with one long prefix only one computes it."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

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
        """The first whole block that this sequence lacks is being filled by one before it in order: nobody waits for
        somebody of less priority."""
        if not self._by_key:
            return False
        _, keys = self._pool.match(sequence.tokens, sequence.request.cache_salt, sequence.length - 1)
        whole = (len(keys) + 1) * self._pool.block_size < sequence.length
        filling = self._by_key.get(self._key(sequence, keys)) if whole else None
        return filling is not None and filling.order < sequence.order

    def name(self, sequence: Sequence, tokens: int) -> None:
        """Work out the keys of the blocks of its first `tokens` tokens, before they are published under them."""
        named, size = sequence.named, self._pool.block_size
        for _ in range(len(sequence.block_keys) + len(named), tokens // size):
            named.append(self._key(sequence, sequence.block_keys, named))

    def _key(self, sequence: Sequence, keys: list[bytes], more: Sequence_[bytes] = ()) -> bytes:
        """Of the block that follows those with these keys."""
        start, size = (len(keys) + len(more)) * self._pool.block_size, self._pool.block_size
        parent = more[-1] if more else keys[-1] if keys else b""
        return block_key(parent, sequence.tokens[start : start + size], sequence.request.cache_salt)
