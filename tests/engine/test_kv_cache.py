"""Admission by free blocks: what was refused is not looked up again, until it may have become possible."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from penstock.engine_service.core.block_pool import BlockPool
from penstock.engine_service.core.kv_cache import KvCache
from penstock.engine_service.core.messages import AddRequest
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.slots import SlotTable

SIZE = 4
SHARED = list(range(100, 112))


class Bench:
    """A cache without a scheduler."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, SIZE)
        self.table = SlotTable(8, 64, SIZE)
        self.kv = KvCache(self.pool, self.table, enable_prefix_caching=True)
        self.looked_up = 0
        self._slots: Iterator[int] = iter(range(8))
        find = self.pool.find

        def counted(digest: bytes, parent: bytes, tokens: bytes) -> int | None:
            self.looked_up += 1
            return find(digest, parent, tokens)

        self.pool.find = counted  # type: ignore[method-assign]

    def sequence(self, prompt: list[int]) -> Sequence:
        return Request.create(AddRequest(1, prompt)).sequences[0]

    def admit(self, sequence: Sequence, headroom: int = 0) -> bool:
        blocks = self.kv.find(sequence, read_prefix=True, headroom=headroom)
        if blocks is None:
            return False
        self.table.take(next(self._slots), sequence)
        self.kv.admit(sequence, blocks, read_prefix=True)
        return True

    def leave(self, sequence: Sequence) -> None:
        self.pool.release(self.kv.release(sequence))
        self.table.leave(sequence, keep_tokens=True)


def test_a_long_sequence_that_does_not_fit_is_looked_up_once() -> None:
    bench = Bench(12)
    other, long = bench.sequence(list(range(16))), bench.sequence(list(range(16, 60)))
    assert bench.admit(other)
    assert not bench.admit(long)
    before = bench.looked_up
    for _ in range(50):
        assert not bench.admit(long)
    assert bench.looked_up - before <= 50  # not one for each of its blocks
    bench.leave(other)
    assert bench.admit(long)


def test_room_without_headroom_is_room_once_nobody_runs() -> None:
    bench = Bench(4)
    long = bench.sequence(list(range(16)))
    assert not bench.admit(long, headroom=1)
    assert not bench.admit(long, headroom=1)
    assert bench.admit(long)


def test_a_prefix_that_is_published_meanwhile_is_found() -> None:
    bench = Bench(6)
    first, second = bench.sequence(SHARED), bench.sequence([*SHARED, 1, 2, 3, 4])
    assert bench.admit(first)
    assert not bench.admit(second)
    assert not bench.admit(second)
    bench.kv.publish(first, len(SHARED))
    assert bench.admit(second)
    assert second.num_computed_tokens == len(SHARED)
    assert second.block_table[:3] == first.block_table


def test_a_found_prefix_that_somebody_else_takes_needs_no_room_of_its_own() -> None:
    bench = Bench(6)
    first = bench.sequence(SHARED[:8])
    assert bench.admit(first)
    bench.kv.publish(first, 8)
    bench.leave(first)  # two blocks cached
    blocker, waiting = bench.sequence(list(range(12))), bench.sequence([*SHARED[:8], 1, 2, 3, 4, 5, 6, 7])
    assert bench.admit(blocker)
    assert not bench.admit(waiting)  # needs four free ones, two of them cached; three are free
    assert bench.admit(bench.sequence([*SHARED[:8], 9]))
    bench.leave(blocker)
    assert bench.admit(waiting)


@pytest.mark.parametrize("counts", [[1, 1, 0], [0, 3, 1], [2, 2, 2]])
def test_blocks_are_given_to_all_or_to_nobody(counts: list[int]) -> None:
    bench = Bench(9)
    sequences = [bench.sequence([number] * 4) for number in range(3)]
    assert all(bench.admit(sequence) for sequence in sequences)
    slots = np.array([sequence.slot for sequence in sequences])
    ends = np.array([4 + 4 * count for count in counts], np.int32)
    assert bench.kv.extend(slots, bench.kv.missing(slots, ends))
    tables = [sequence.block_table for sequence in sequences]
    assert [len(table) for table in tables] == [1 + count for count in counts]
    held = [block for table in tables for block in table]
    assert len(set(held)) == len(held)
    assert not bench.kv.extend(slots, bench.kv.missing(slots, ends + 40))
    assert [sequence.block_table for sequence in sequences] == tables
