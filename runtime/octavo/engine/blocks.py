"""The block pool: who owns which block of the KV cache, and which blocks can be found again by their content.

Every block except block 0 (the null block: padding, always zeros) is in exactly one of three places:

    free     nobody holds it and its content means nothing         -> `_free`, a stack
    cached   nobody holds it, but its content can be found by key   -> `_idle`, oldest first (LRU)
    used     one or more sequences hold it                          -> `_holders[block] > 0`

so `free + cached + used = num_blocks - 1` always. A used block may be findable too: then a prompt which begins alike
shares it. Keys are a hash chain (parent key, tokens, salt) of a collision-resistant hash, and a hit compares the tokens
as well: a collision must never show one user another's keys and values (CVE-2025-25183). Called by the scheduler only;
no torch here.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile

NULL_BLOCK = 0
_ROOT = b"octavo"


def block_key(parent: bytes, tokens: Sequence[int], salt: bytes) -> bytes:
    """Key of a block: 16 bytes of BLAKE2b over the parent's key, the salt and the tokens."""
    digest = blake2b(parent or _ROOT, digest_size=16, key=salt[:64] or b"", person=b"kv-block")
    if len(salt) > 64:
        digest.update(salt)
    digest.update(array("q", tokens).tobytes())
    return digest.digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, block 0 reserved. All operations are O(1) a block."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks (one is the null block), not {num_blocks}")
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._content: dict[int, tuple[bytes, bytes, tuple[int, ...]]] = {}  # block -> (key, parent, tokens)

    @property
    def capacity(self) -> int:
        """Blocks that sequences can hold."""
        return self.num_blocks - 1

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.capacity - self.available

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that can still be found."""
        return len(self._idle)

    @property
    def cached_blocks(self) -> list[int]:
        """Those, the one that is given away next first."""
        return list(self._idle)

    def is_shared(self, block: int) -> bool:
        return self._holders[block] > 1

    def shared_by(self, blocks: Sequence[int], holders: int) -> int:
        """How many of `blocks`, from the first on, have at least so many holders."""
        found = takewhile(lambda block: self._holders[block] >= holders, blocks)
        return sum(1 for _ in found)

    def is_idle(self, block: int) -> bool:
        """Cached: taking it up again costs one of `available`."""
        return self._holders[block] == 0

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for one holder, or None (and nothing changed) if there are not so many."""
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _nothing = self._idle.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each: a prefix hit, or a fork."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._idle[block]  # KeyError here: the block was free, and the caller's list is wrong
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. The last blocks become the oldest in the LRU order: a prefix outlives its tail."""
        for block in reversed(blocks):
            if self._holders[block] <= 0:
                raise RuntimeError(f"block {block} is released more often than it is held")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._content:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, parent: bytes, tokens: Sequence[int], salt: bytes, key: bytes | None = None) -> bytes:
        """Make a full block findable; returns its key. If another block already has this content, that one stays.
        `key`: where it is known already."""
        key = key or block_key(parent, tokens, salt)
        if self.caching and key not in self._block_of and block not in self._content:
            self._block_of[key] = block
            self._content[block] = (key, parent, tuple(tokens))
        return key

    def match(self, tokens: Sequence[int], salt: bytes, limit: int) -> tuple[list[int], list[bytes]]:
        """Blocks (and their keys) of the longest known prefix of `tokens`, full blocks within `limit` tokens only."""
        blocks: list[int] = []
        keys: list[bytes] = []
        parent = b""
        for start in range(0, limit - self.block_size + 1, self.block_size):
            chunk = tokens[start : start + self.block_size]
            key = block_key(parent, chunk, salt)
            block = self.find(key, parent, chunk)
            if block is None:
                break
            blocks.append(block)
            keys.append(key)
            parent = key
        return blocks, keys

    def find(self, key: bytes, parent: bytes, tokens: Sequence[int]) -> int | None:
        """The block of this key, if it is known and its content is this."""
        block = self._block_of.get(key)
        return block if block is not None and self._content[block][1:] == (parent, tuple(tokens)) else None

    def discard(self, blocks: Iterable[int]) -> None:
        """Make blocks unfindable, because what they hold is not to be trusted. Holders keep them."""
        for block in blocks:
            if block in self._content:
                self._forget(block)
                if self._holders[block] == 0:
                    del self._idle[block]
                    self._free.append(block)

    def clear_cache(self) -> int:
        """Forget all content; returns how many cached blocks became free."""
        idle = len(self._idle)
        self.discard(list(self._content))
        return idle

    def _forget(self, block: int) -> None:
        key, _, _ = self._content.pop(block)
        del self._block_of[key]
