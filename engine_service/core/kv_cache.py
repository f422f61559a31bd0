"""Which blocks each sequence holds, and which of them it found by prefix. Knows no queue and no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.engine_service.core.block_pool import BlockPool, pack
from penstock.engine_service.core.request import Sequence


@dataclass(slots=True)
class _Chain:
    """Hashes of a sequence's full blocks, as far as they were needed. hashes[0] is the root."""

    hashes: list[bytes]
    tokens: list[bytes] = field(default_factory=list)  # packed ids of block i
    num_published: int = 0


class KvCache:
    """Block tables of live sequences over one pool."""

    def __init__(self, pool: BlockPool, enable_prefix_caching: bool) -> None:
        self.pool = pool
        self._enabled = enable_prefix_caching
        self._chains: dict[Sequence, _Chain] = {}
        self.num_queries = 0  # tokens looked up
        self.num_hits = 0  # tokens found

    def admit(self, sequence: Sequence, *, read_prefix: bool, headroom: int) -> bool:
        """Gives a sequence without blocks all the blocks of its tokens, found ones first, and sets its
        num_computed_tokens to what was found. False, and nothing changes, when that would leave fewer than
        `headroom` blocks free. The last token is never found: a step must compute it to sample."""
        found = self._find(sequence) if self._enabled and read_prefix else []
        needed = self.pool.blocks_for(sequence.num_tokens) - len(found)
        for block in found:
            self.pool.share(block)
        fresh = self.pool.allocate(needed) if needed + headroom <= self.pool.num_free else None
        if fresh is None:
            self.pool.release(found)
            return False
        sequence.block_table[:] = found + fresh
        sequence.num_computed_tokens = len(found) * self.pool.block_size
        if self._enabled:
            self._chain(sequence).num_published = len(found)
            if read_prefix:
                self.num_queries += sequence.num_tokens
                self.num_hits += sequence.num_computed_tokens
        return True

    def extend(self, sequence: Sequence) -> bool:
        """Makes the block table cover all tokens of the sequence. False when there is no free block."""
        missing = self.pool.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        sequence.block_table.extend(fresh)
        return True

    def publish(self, sequence: Sequence) -> None:
        """Makes the blocks that have become full and computed findable."""
        if not self._enabled:
            return
        chain = self._chain(sequence)
        full = sequence.num_computed_tokens // self.pool.block_size
        if full <= chain.num_published:
            return
        self._grow(chain, sequence, full)
        for index in range(chain.num_published, full):
            block = sequence.block_table[index]
            self.pool.publish(block, chain.hashes[index + 1], chain.hashes[index], chain.tokens[index])
        chain.num_published = full

    def release(self, sequence: Sequence) -> None:
        """Gives all blocks of the sequence back; it has computed nothing from here on."""
        self.pool.release(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over: blocks and bookkeeping go."""
        self.release(sequence)
        self._chains.pop(sequence, None)

    def _find(self, sequence: Sequence) -> list[int]:
        limit = (sequence.num_tokens - 1) // self.pool.block_size
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
        for index in range(len(chain.tokens), num_blocks):
            tokens = pack(sequence.token_ids[index * size : (index + 1) * size])
            chain.tokens.append(tokens)
            chain.hashes.append(self.pool.chain(chain.hashes[index], tokens))
