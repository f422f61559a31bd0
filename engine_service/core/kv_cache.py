"""Which blocks each sequence holds, and which of them it found by prefix. Knows no queue and no tensors.

Block tables are rows of the slot table; what makes blocks findable is kept by sequence, since it outlives a
slot.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from penstock.engine_service.core.block_pool import BlockPool
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.slots import Int32s, Int64s, SlotTable

log = logging.getLogger("penstock.engine.kv_cache")


@dataclass(slots=True)
class _Chain:
    """Hashes of a sequence's full blocks, as far as they were needed. hashes[0] is the root."""

    hashes: list[bytes]
    tokens: list[bytes] = field(default_factory=list)  # packed ids of block i
    num_published: int = 0


@dataclass(slots=True)
class _Refusal:
    """Why a sequence was not admitted: nothing is looked up again until that may have changed."""

    sequence: Sequence
    headroom: int
    needed: int  # free blocks, those it found and nobody held included
    num_found: int


class KvCache:
    """Block tables of running sequences over one pool."""

    def __init__(self, pool: BlockPool, table: SlotTable, enable_prefix_caching: bool) -> None:
        self.pool = pool
        self._table = table
        self._enabled = enable_prefix_caching
        self._chains: dict[Sequence, _Chain] = {}
        self._refusal: _Refusal | None = None
        self.num_queries = 0  # tokens looked up
        self.num_hits = 0  # tokens found

    # ------------------------------------------------------------------ getting blocks

    def find(
        self, sequence: Sequence, *, read_prefix: bool, headroom: int
    ) -> tuple[list[int], list[int]] | None:
        """Blocks for all the tokens of a sequence without any: those found by their content, and new ones.

        None, and nothing changes, when that would leave fewer than `headroom` blocks free. At most
        num_findable tokens are found.
        """
        if self._still_refused(sequence, headroom):
            return None
        if not self._enabled:
            found = self._of_first_choice(sequence)
        else:
            found = self._look_up(sequence) if read_prefix else []
        num_new = self.pool.blocks_for(sequence.num_tokens) - len(found)
        num_free = self.pool.num_free
        for block in found:
            self.pool.share(block)
        if num_new + headroom <= self.pool.num_free and (fresh := self.pool.allocate(num_new)) is not None:
            self._refusal = None
            return found, fresh
        revived = num_free - self.pool.num_free
        self.pool.release(found)
        self._refusal = _Refusal(sequence, headroom, num_new + headroom + revived, len(found))
        return None

    def admit(self, sequence: Sequence, blocks: tuple[list[int], list[int]], *, read_prefix: bool) -> None:
        """Writes what `find` gave into the row of the sequence's new slot; what was found counts as
        computed."""
        found, fresh = blocks
        slot = sequence.slot
        self._table.append_blocks(slot, found + fresh)
        self._table.num_computed[slot] = len(found) * self.pool.block_size
        if self._enabled:
            self._chain(sequence).num_published = len(found)
            if read_prefix:
                self.num_queries += sequence.num_tokens
                self.num_hits += len(found) * self.pool.block_size

    def fork(self, parent: Sequence, num_shared: int, num_tokens: int) -> tuple[list[int], list[int]] | None:
        """Blocks for a sequence of num_tokens that begins like `parent`, whose first num_shared tokens are
        computed: the full ones of these are shared, the others new. None when there are too few."""
        full = num_shared // self.pool.block_size
        fresh = self.pool.allocate(self.pool.blocks_for(num_tokens) - full)
        if fresh is None:
            return None
        shared = self._table.blocks(parent.slot)[:full]
        for block in shared:
            self.pool.share(block)
        return shared, fresh

    def seat_fork(
        self, sequence: Sequence, parent: Sequence, blocks: tuple[list[int], list[int]], num_shared: int
    ) -> None:
        """Writes what `fork` gave into the row of the sequence's new slot. What is shared counts as computed,
        a partial block included, which must be copied before it is read."""
        shared, fresh = blocks
        self._table.append_blocks(sequence.slot, shared + fresh)
        self._table.num_computed[sequence.slot] = num_shared
        if self._enabled:
            chain, full = self._chain(parent), len(shared)
            self._chains[sequence] = _Chain(
                chain.hashes[: full + 1], chain.tokens[:full], min(full, chain.num_published)
            )

    def missing(self, slots: Int64s, ends: Int32s) -> Int64s:
        """Blocks that each of `slots` lacks to hold `ends` tokens, [n], 0 or less: none."""
        return -(-ends // self.pool.block_size) - self._table.num_blocks[slots]

    def extend(self, slots: Int64s, missing: Int64s) -> bool:
        """Gives each of `slots` its missing blocks, or nobody anything: False when there are too few."""
        short = np.flatnonzero(missing > 0)
        if not short.size:
            return True
        counts = missing[short]
        blocks = self.pool.allocate(int(counts.sum()))
        if blocks is None:
            return False
        rows = slots[short]
        if counts.max() == 1:
            self._table.block_tables[rows, self._table.num_blocks[rows]] = blocks
            self._table.num_blocks[rows] += 1
            return True
        for slot, count in zip(rows.tolist(), counts.tolist(), strict=True):
            self._table.append_blocks(slot, blocks[:count])
            del blocks[:count]
        return True

    # ------------------------------------------------------------------ making blocks findable

    def publish(self, sequence: Sequence, num_computed: int) -> None:
        """Makes the blocks that have become full and computed findable."""
        if not self._enabled:
            return
        chain = self._chain(sequence)
        full = num_computed // self.pool.block_size
        if full <= chain.num_published:
            return
        self._grow(chain, sequence, full)
        row = self._table.block_tables[sequence.slot]
        blocks = row[chain.num_published : full].tolist()
        for index, block in enumerate(blocks, chain.num_published):
            self.pool.publish(block, chain.hashes[index + 1], chain.hashes[index], chain.tokens[index])
        chain.num_published = full

    def publish_full(self, sequences: list[Sequence], slots: Int64s, ends: Int32s) -> list[Sequence]:
        """Like publish, for sequences of which each has just completed one more block. Those that failed."""
        failed: list[Sequence] = []
        if not self._enabled:
            return failed
        size = self.pool.block_size
        packed = self._table.tokens[slots[:, None], ends[:, None] + np.arange(-size, 0)].tobytes()
        blocks = self._table.block_tables[slots, ends // size - 1].tolist()
        width = 4 * size
        for place, (sequence, block) in enumerate(zip(sequences, blocks, strict=True)):
            try:
                chain = self._chains.get(sequence)
                end = int(ends[place])
                if chain is None or not len(chain.tokens) == chain.num_published == end // size - 1:
                    self.publish(sequence, end)
                    continue
                self._append(chain, packed[place * width : (place + 1) * width])
                self.pool.publish(block, chain.hashes[-1], chain.hashes[-2], chain.tokens[-1])
                chain.num_published += 1
            except Exception:
                log.exception("the blocks of request %d cannot be shared", sequence.request.id)
                failed.append(sequence)
        return failed

    # ------------------------------------------------------------------ giving blocks back

    def release(self, sequence: Sequence) -> list[int]:
        """The blocks that the sequence gives up with its slot; the caller hands them to the pool when nothing
        writes to them any more."""
        blocks = self._table.blocks(sequence.slot)
        self._table.num_blocks[sequence.slot] = 0
        return blocks

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over: the bookkeeping goes."""
        self._chains.pop(sequence, None)
        if self._refusal is not None and self._refusal.sequence is sequence:
            self._refusal = None

    # ------------------------------------------------------------------ inside

    def _still_refused(self, sequence: Sequence, headroom: int) -> bool:
        """Whether the sequence, which was the last to be looked up, would be refused again: O(1), whatever
        its length. Only another one's admission could have taken what it found, and that ends the refusal."""
        last = self._refusal
        if last is None or last.sequence is not sequence or last.headroom != headroom:
            return False
        chain = self._chains.get(sequence)
        if chain is not None and last.num_found < len(chain.tokens):
            index = last.num_found  # the block after the found ones may have come
            if self.pool.find(chain.hashes[index + 1], chain.hashes[index], chain.tokens[index]) is not None:
                return False
        return self.pool.num_free < last.needed

    def _of_first_choice(self, sequence: Sequence) -> list[int]:
        """The prompt's full blocks, for a choice that begins while the first one runs, which has them."""
        request = sequence.request
        first = request.sequences[0]
        count = (sequence.num_tokens - 1) // self.pool.block_size
        is_ahead = sequence is not first and first.num_computed_tokens >= count * self.pool.block_size
        if not (request.started and is_ahead) or sequence.num_output_tokens:
            return []
        return self._table.blocks(first.slot)[:count]

    def _look_up(self, sequence: Sequence) -> list[int]:
        limit = sequence.num_findable // self.pool.block_size
        chain = self._chain(sequence)
        self._grow(chain, sequence, limit)
        found: list[int] = []
        for index in range(limit):
            block = self.pool.find(chain.hashes[index + 1], chain.hashes[index], chain.tokens[index])
            if block is None:
                break
            found.append(block)
        return found

    def _chain(self, sequence: Sequence) -> _Chain:
        chain = self._chains.get(sequence)
        if chain is None:
            chain = self._chains[sequence] = _Chain([self.pool.root(sequence.request.params.cache_salt)])
        return chain

    def _grow(self, chain: _Chain, sequence: Sequence, num_blocks: int) -> None:
        size = self.pool.block_size
        first = len(chain.tokens)
        if first >= num_blocks:
            return
        packed = sequence.token_ids[first * size : num_blocks * size].tobytes()
        width = 4 * size
        for start in range(0, len(packed), width):
            self._append(chain, packed[start : start + width])

    def _append(self, chain: _Chain, tokens: bytes) -> None:
        digest = self.pool.chain(chain.hashes[-1], tokens)
        chain.tokens.append(tokens)
        chain.hashes.append(digest)
