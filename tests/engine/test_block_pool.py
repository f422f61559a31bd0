"""The block pool by properties, against a plain model of what it must do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine_service.core.block_pool import BlockPool, pack

SIZE = 4


def publish(pool: BlockPool, block: int, parent: bytes, tokens: list[int]) -> bytes:
    packed = pack(tokens)
    digest = pool.chain(parent, packed)
    pool.publish(block, digest, parent, packed)
    return digest


def find(pool: BlockPool, parent: bytes, tokens: list[int]) -> int | None:
    packed = pack(tokens)
    return pool.find(pool.chain(parent, packed), parent, packed)


def test_allocates_each_block_once_and_none_when_short() -> None:
    pool = BlockPool(5, SIZE)
    first = pool.allocate(3)
    second = pool.allocate(2)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool.release(first)
    assert (pool.num_free, pool.num_used) == (3, 2)


def test_published_block_is_found_until_it_is_reused() -> None:
    pool = BlockPool(2, SIZE)
    root = pool.root("")
    block = pool.allocate(1)
    assert block is not None
    publish(pool, block[0], root, [1, 2, 3, 4])
    assert find(pool, root, [1, 2, 3, 4]) == block[0]
    pool.release(block)
    assert pool.num_cached == 1
    assert find(pool, root, [1, 2, 3, 4]) == block[0]
    assert pool.allocate(2) is not None
    assert find(pool, root, [1, 2, 3, 4]) is None


def test_hit_needs_equal_tokens_parent_and_salt() -> None:
    pool = BlockPool(4, SIZE)
    root = pool.root("")
    blocks = pool.allocate(2)
    assert blocks is not None
    first = publish(pool, blocks[0], root, [1, 2, 3, 4])
    publish(pool, blocks[1], first, [5, 6, 7, 8])
    assert find(pool, first, [5, 6, 7, 8]) == blocks[1]
    assert find(pool, root, [5, 6, 7, 8]) is None
    assert find(pool, pool.root("salt"), [1, 2, 3, 4]) is None
    assert find(pool, root, [1, 2, 3, 5]) is None


def test_a_colliding_hash_is_no_hit() -> None:
    pool = BlockPool(2, SIZE)
    block = pool.allocate(1)
    assert block is not None
    pool.publish(block[0], b"same", b"p", pack([1, 2, 3, 4]))
    assert pool.find(b"same", b"p", pack([1, 2, 3, 4])) == block[0]
    assert pool.find(b"same", b"p", pack([1, 2, 3, 9])) is None
    assert pool.find(b"same", b"q", pack([1, 2, 3, 4])) is None


def test_hashes_differ_between_processes_and_not_with_one_seed() -> None:
    assert BlockPool(1, SIZE).root("") != BlockPool(1, SIZE).root("")
    assert BlockPool(1, SIZE, seed=b"x").root("") == BlockPool(1, SIZE, seed=b"x").root("")


def test_reuse_is_least_recently_used_and_ends_before_starts() -> None:
    pool = BlockPool(4, SIZE)
    root = pool.root("")
    chain = pool.allocate(2)
    other = pool.allocate(2)
    assert chain is not None
    assert other is not None
    first = publish(pool, chain[0], root, [1] * SIZE)
    publish(pool, chain[1], first, [2] * SIZE)
    publish(pool, other[0], root, [3] * SIZE)
    publish(pool, other[1], root, [4] * SIZE)
    pool.release(chain)
    pool.release(other)
    assert pool.allocate(1) == [chain[1]]  # released first, and the end of its chain
    pool.share(chain[0])  # touched: now used most recently
    pool.release([chain[0]])
    assert pool.allocate(2) == [other[1], other[0]]
    assert find(pool, root, [1] * SIZE) == chain[0]


def test_flush_forgets_only_what_nobody_holds() -> None:
    pool = BlockPool(3, SIZE)
    root = pool.root("")
    held = pool.allocate(1)
    gone = pool.allocate(1)
    assert held is not None
    assert gone is not None
    publish(pool, held[0], root, [1] * SIZE)
    publish(pool, gone[0], root, [2] * SIZE)
    pool.release(gone)
    assert pool.flush() == 1
    assert find(pool, root, [2] * SIZE) is None
    assert find(pool, root, [1] * SIZE) == held[0]
    assert pool.flush() == 0


def test_negative_ids_cannot_be_packed() -> None:
    with pytest.raises(OverflowError):
        pack([-1])


@settings(max_examples=60)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from("arspf"), st.integers(0, 30), st.integers(0, 5)), max_size=80),
)
def test_counts_always_add_up(num_blocks: int, actions: list[tuple[str, int, int]]) -> None:
    """Random use: counts add up, held blocks are never handed out, found content is what was published."""
    pool = BlockPool(num_blocks, SIZE)
    root = pool.root("")
    owners: list[list[int]] = []
    written: dict[int, int] = {}
    for action, pick, content in actions:
        if action == "a":
            blocks = pool.allocate(pick % 4)
            held = {block for owner in owners for block in owner}
            if blocks is None:
                assert pick % 4 > num_blocks - len(held)
                continue
            assert held.isdisjoint(blocks)
            for block in blocks:
                written.pop(block, None)
            owners.append(blocks)
        elif action == "r" and owners:
            pool.release(owners.pop(pick % len(owners)))
        elif action == "p" and owners and owners[pick % len(owners)]:
            block = owners[pick % len(owners)][0]
            if not pool.is_published(block):
                packed = pack([content] * SIZE)
                if pool.publish(block, pool.chain(root, packed), root, packed):
                    written[block] = content
        elif action == "s":
            block_found = find(pool, root, [content] * SIZE)
            if block_found is not None:
                assert written[block_found] == content
                pool.share(block_found)
                owners.append([block_found])
        elif action == "f":
            pool.flush()
        counts: dict[int, int] = {}
        for owner in owners:
            for block in owner:
                counts[block] = counts.get(block, 0) + 1
        assert all(pool.references(block) == counts.get(block, 0) for block in range(num_blocks))
        assert pool.num_used == len(counts)
