"""Paged KV-cache blocks: reference counts, content hashes, least-recently-used reuse. Knows no requests.

A block holds keys and values of `block_size` tokens. It is in one of three states: held (one or more
sequences refer to it), cached (nobody refers to it, but its content can be found again by hash) or blank.
Only full blocks get a hash, and a hashed block is never written again, so sharing is always read-only.

A hash covers everything that decides the content: a per-process random key, the salt, and every token up to
the end of the block (each hash takes in the one before it, and the first one takes in key and salt). The
tokens are compared again on each hit, so even a collision could not hand out somebody else's keys and values.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Ids

HASH_BYTES = 32


# (hash, parent's hash, packed ids): a plain tuple of bytes, which the garbage collector does not keep
# visiting.
_Content = tuple[bytes, bytes, bytes]


def pack(token_ids: Ids[int]) -> bytes:
    """Token ids as native unsigned 32-bit integers."""
    return array("I", token_ids).tobytes()


class BlockPool:
    """Hands out block numbers in [0, num_blocks). Every operation is O(1) per block."""

    def __init__(self, num_blocks: int, block_size: int, seed: bytes | None = None) -> None:
        """seed: key of the hashes, random when None, at most 64 bytes."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._key = secrets.token_bytes(32) if seed is None else seed
        self._refs = [0] * num_blocks
        self._contents: list[_Content | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def root(self, salt: str) -> bytes:
        """The hash before the first block: different salts never share a block."""
        return hashlib.blake2b(b"root:" + salt.encode(), key=self._key, digest_size=HASH_BYTES).digest()

    def chain(self, parent: bytes, tokens: bytes) -> bytes:
        """The hash of a full block. tokens: its packed ids."""
        return hashlib.blake2b(parent + tokens, digest_size=HASH_BYTES).digest()

    def find(self, digest: bytes, parent: bytes, tokens: bytes) -> int | None:
        """The block with exactly this content, or None."""
        block = self._by_hash.get(digest)
        if block is None or self._contents[block] != (digest, parent, tokens):
            return None
        return block

    def share(self, block: int) -> None:
        """One more reader of a block that `find` returned."""
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for writing, each with one reference, or None when there are too few. Blank ones
        first, then the cached ones unused for longest, whose content is forgotten."""
        if count > self.num_free:
            return None
        blocks = self._blank[: -count - 1 : -1]
        del self._blank[len(self._blank) - len(blocks) :]
        while len(blocks) < count:
            blocks.append(self._evict())
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def publish(self, block: int, digest: bytes, parent: bytes, tokens: bytes) -> bool:
        """Makes a full, computed block findable. False when the same content already is, elsewhere."""
        if digest in self._by_hash:
            return False
        self._contents[block] = (digest, parent, tokens)
        self._by_hash[digest] = block
        return True

    def release(self, blocks: list[int]) -> None:
        """Gives references back. The end of a chain is reused before its start, which more prompts share."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if self._contents[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def flush(self) -> int:
        """Forgets the content of every block that nobody holds; how many those were."""
        count = len(self._cached)
        while self._cached:
            self._blank.append(self._evict())
        return count

    def references(self, block: int) -> int:
        return self._refs[block]

    def is_published(self, block: int) -> bool:
        return self._contents[block] is not None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        content = self._contents[block]
        if content is not None:
            del self._by_hash[content[0]]
            self._contents[block] = None
        return block
