"""What an encoder-decoder translates from: a request's source, and the blocks of its keys and values.

A source is encoded whole, in the step in which the first sequence of its request gets a row. Its blocks come from the
same pool as all others, because a decoder's layer needs as much room for a token of the source as for one of its own.
They belong to the request: all its sequences read them, and they go back when none of these has a row any more. A
source that is in the cache, or that another running request holds, is not encoded again. Called by the scheduler; no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from octavo.engine.blocks import BlockPool, block_key
from octavo.engine.plan import NewSource, SourcePlace

if TYPE_CHECKING:
    from octavo.engine.draft import Draft
    from octavo.engine.request import Request

_ROOT = b"octavo-source"


class Source:
    """Token ids of a source. `digest` names it: a token's keys and values depend on all of it, in both directions."""

    __slots__ = ("blocks", "digest", "ids", "published", "salt")

    def __init__(self, ids: Sequence[int], salt: bytes) -> None:
        self.ids, self.salt = tuple(ids), salt
        self.digest = block_key(_ROOT, self.ids, salt)
        self.blocks: list[int] = []
        """Held while a sequence of its request has a row."""
        self.published = False

    def chunks(self, size: int) -> Iterator[tuple[bytes, bytes, tuple[int, ...]]]:
        """Key, parent key and tokens of each block; the last may not be full."""
        parent = self.digest
        for start in range(0, len(self.ids), size):
            chunk = self.ids[start : start + size]
            key = block_key(parent, chunk, self.salt)
            yield key, parent, chunk
            parent = key


class SourceBlocks:
    """The sources that are in the cache. `budget`: tokens that one step encodes; a longer source is encoded alone."""

    def __init__(self, pool: BlockPool, budget: int) -> None:
        self._pool, self._budget = pool, budget
        self._held: dict[bytes, Source] = {}
        """By digest: one of the requests' sources that hold these blocks."""
        self.hits = 0
        """Sources that were found, and not encoded again."""

    def missing(self, request: Request, draft: Draft) -> int | None:
        """How many of the pool's available blocks it takes to give a sequence of `request` its source; None: it is to
        be encoded, and not in this step."""
        source = request.source
        if source is None or source.blocks:
            return 0
        found = self._find(source)
        if found is not None:
            return sum(map(self._pool.is_idle, found))
        encoded = sum(len(new.ids) for new in draft.sources)
        if encoded and encoded + len(source.ids) > self._budget:
            return None
        return -(-len(source.ids) // self._pool.block_size)

    def take(self, request: Request, draft: Draft) -> bool:
        """A sequence of `request` gets a row, and there is room as `missing` said. True: the source need not be
        encoded, or not again."""
        source = request.source
        if source is None or source.blocks:
            return True
        found = self._find(source)
        if found is not None:
            self._pool.hold(found)
            self.hits += 1
            source.blocks = found
        else:
            source.blocks = self._pool.allocate(-(-len(source.ids) // self._pool.block_size)) or []
            draft.sources.append(NewSource(source.ids, tuple(source.blocks)))
        self._held.setdefault(source.digest, source)
        return found is not None

    def publish(self, request: Request) -> None:
        """A step ran in which a sequence of `request` read its source: it can be found from now on."""
        source = request.source
        if source is None or source.published:
            return
        source.published = True
        for block, (key, parent, chunk) in zip(source.blocks, source.chunks(self._pool.block_size), strict=True):
            self._pool.publish(block, parent, chunk, source.salt, key)

    def leave(self, request: Request) -> None:
        """A sequence of `request` left its row."""
        source = request.source
        if source is None or not source.blocks or any(sequence.row >= 0 for sequence in request.sequences):
            return
        self._pool.release(source.blocks)
        source.blocks, source.published = [], False
        if self._held.get(source.digest) is source:
            del self._held[source.digest]

    def alone(self, request: Request) -> list[int]:
        """Blocks of the source that only one sequence reads, the last of `request`."""
        source = request.source
        if source is None or sum(sequence.row >= 0 for sequence in request.sequences) > 1:
            return []
        return [block for block in source.blocks if not self._pool.is_shared(block)]

    def _find(self, source: Source) -> list[int] | None:
        held = self._held.get(source.digest)
        if held is not None and held.ids == source.ids and held.salt == source.salt:
            return list(held.blocks)
        blocks = []
        for key, parent, chunk in source.chunks(self._pool.block_size):
            block = self._pool.find(key, parent, chunk)
            if block is None:
                return None
            blocks.append(block)
        return blocks


def place_of(request: Request) -> SourcePlace | None:
    """What a row must know of its source."""
    source = request.source
    return None if source is None else SourcePlace(len(source.ids), tuple(source.blocks))
