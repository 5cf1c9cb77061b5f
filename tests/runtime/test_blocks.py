"""The block pool: after any sequence of operations every block is in exactly one place, and a hit has the right
tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from octavo.engine import blocks as blocks_module
from octavo.engine.blocks import NULL_BLOCK, BlockPool, block_key


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, publish, discard and give back blocks; a model of plain lists says what must be true."""

    @initialize(size=st.integers(2, 12), caching=st.booleans())
    def start(self, size: int, caching: bool) -> None:
        self.pool = BlockPool(size, 2, caching=caching)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[tuple[int, ...], bytes]] = {}
        """What each published block holds: all tokens up to its end, and the salt."""
        self.lost: set[int] = set()

    def holders(self, block: int) -> int:
        return sum(mine.count(block) for mine in self.held)

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        before = self.pool.available
        got = self.pool.allocate(count)
        assert (got is None) == (count > before)
        if got is not None:
            assert len(set(got)) == count
            assert NULL_BLOCK not in got
            assert all(self.holders(block) == 0 for block in got), "a block that somebody holds was given away"
            for block in got:
                self.content.pop(block, None)
            self.held.append(got)
        assert self.pool.available == before - (len(got) if got else 0)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        mine = data.draw(st.sampled_from(self.held))
        self.pool.hold(mine)
        self.held.append(list(mine))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        mine = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(mine)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 2), max_size=8), salt=st.sampled_from([b"", b"a"]))
    def prefill(self, data: st.DataObject, tokens: list[int], salt: bytes) -> None:
        """Publish the full blocks of a prompt in a holder's own blocks, each once."""
        mine = data.draw(st.sampled_from(self.held))
        parent = b""
        for index in range(min(len(mine), len(tokens) // 2)):
            block, chunk = mine[index], tokens[2 * index : 2 * index + 2]
            if self.holders(block) > 1 or block in self.content:
                return
            parent = self.pool.publish(block, parent, chunk, salt)
            self.content[block] = (tuple(tokens[: 2 * index + 2]), salt)

    @rule(tokens=st.lists(st.integers(0, 2), max_size=9), salt=st.sampled_from([b"", b"a"]))
    def match(self, tokens: list[int], salt: bytes) -> None:
        found, keys = self.pool.match(tokens, salt, len(tokens))
        assert len(found) == len(keys) <= len(tokens) // 2
        for index, block in enumerate(found):
            assert self.content[block] == (tuple(tokens[: 2 * index + 2]), salt), "a hit with other tokens"
            assert block not in self.lost
        self.pool.hold(found)
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        mine = data.draw(st.sampled_from(self.held))
        self.pool.discard(mine)
        for block in mine:
            self.content.pop(block, None)

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()
        self.content.clear()
        assert self.pool.cached == 0

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        used = {block for mine in self.held for block in mine}
        assert pool.used == len(used)
        assert len(pool._free) + pool.cached + pool.used == pool.capacity
        assert pool._holders == [self.holders(block) for block in range(pool.num_blocks)]
        assert set(pool._free) | set(pool._idle) | used == set(range(1, pool.num_blocks))
        assert not set(pool._free) & set(pool._idle)
        assert not (set(pool._free) | set(pool._idle)) & used
        assert {key: block for block, (key, _, _) in pool._content.items()} == pool._block_of
        assert set(pool._idle) <= set(pool._content)
        assert pool.caching or not pool._content


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def _publish(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    blocks = pool.allocate(len(tokens) // pool.block_size)
    assert blocks is not None
    parent = b""
    for index, block in enumerate(blocks):
        parent = pool.publish(block, parent, tokens[index * 4 : index * 4 + 4], salt)
    return blocks


def test_the_least_recently_used_goes_first_and_a_prefix_outlives_its_tail() -> None:
    pool = BlockPool(6, 4)
    first, second = _publish(pool, [1] * 8), _publish(pool, [2] * 8)
    pool.release(first)
    pool.release(second)
    assert pool.allocate(1) is not None  # the one block never used
    assert pool.allocate(1) == [first[1]]
    assert pool.match([1] * 8, b"", 8)[0] == first[:1]
    assert pool.match([2] * 8, b"", 8)[0] == second
    pool.hold(first[:1])
    pool.release(first[:1])  # touched: now younger than the second's
    assert pool.allocate(2) == [second[1], second[0]]


def test_a_colliding_key_never_gives_another_prompts_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash under which everything collides, hits still compare the tokens (CVE-2025-25183)."""
    monkeypatch.setattr(blocks_module, "block_key", lambda parent, tokens, salt: b"same")
    pool = BlockPool(6, 4)
    blocks = _publish(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4], b"", 4)[0] == blocks
    assert pool.match([1, 2, 3, 5], b"", 4)[0] == []


def test_keys_depend_on_parent_tokens_and_the_whole_salt() -> None:
    rng = random.Random(0)
    keys = {block_key(b"p", [rng.randrange(50000) for _ in range(16)], b"") for _ in range(2000)}
    assert len(keys) == 2000
    base = block_key(b"", [1, 2], b"")
    long = b"s" * 64
    others = [
        block_key(b"x", [1, 2], b""), block_key(b"", [2, 1], b""), block_key(b"", [1, 2], b"salt"),
        block_key(b"", [1, 2], long), block_key(b"", [1, 2], long + b"1"), block_key(b"", [1, 2], long + b"2"),
        block_key(b"", [258], b""),
    ]  # fmt: skip
    assert len({base, *others}) == 8


def test_misuse_is_an_error() -> None:
    pool = BlockPool(4, 4)
    with pytest.raises(ValueError):
        BlockPool(1, 4)
    (block,) = pool.allocate(1) or []
    pool.release([block])
    with pytest.raises(RuntimeError):
        pool.release([block])
    with pytest.raises(KeyError):
        pool.hold([block])
