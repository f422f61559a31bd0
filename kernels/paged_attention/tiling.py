"""Tile sizes of the attention kernels by shape, dtype and device generation; plain arithmetic, no tensors.

Shared memory stays within 99 KiB, what every device from sm_80 on has. Of three stages, two have a tile of
keys each: one is loaded while the other is computed. With two stages, there is one tile and no overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_ROWS = 64  # of a split's tile: more are a chunk's
_QUERIES = (1, 2, 4, 8, 16)  # new tokens that a split takes; few values, for each is a compile
_LAUNCHES_PER_SM = 16  # programs launched; those that find no split exit at once
_FEWEST_PROGRAMS = 4  # for the splits of one sequence and key/value head
# Keys of a split, and what lengths are rounded up to. Short splits fill a device with few sequences: 1024
# tokens make 4 for each key/value head. Each costs a part, written and read once, in float32: 2 * group /
# length of the bytes of its keys and values, 3 % at a group of 4.
_SHORTEST_SPLIT = 256
# Of one sequence. With 32, 8 key/value heads and one sequence of 8192 tokens or more are 256 programs. Parts
# take sequences * query heads * splits * head_dim * 4 bytes: 134 MB for 256 * 32 * 32 * 128.
_MOST_SPLITS = 32


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: token times query head of one key/value head; keys: of one step; group: query heads at a time."""

    rows: int
    keys: int
    tokens: int
    group: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Splits:
    """`most` and `shortest` fix where a sequence is split: they are the same for every batch."""

    most: int  # splits of one sequence
    shortest: int  # keys
    room: int  # splits a sequence within the bound can have
    programs: int  # that share a sequence's splits, for one key/value head


def queries_of_splits(max_query_len: int, group: int) -> int:
    """New tokens of a sequence that the split kernel takes; 0 when one of `max_query_len` has too many."""
    group = min(group, MOST_ROWS)
    return next((n for n in _QUERIES if n >= max_query_len and n * group <= MOST_ROWS), 0)


def split_tile(head_dim: int, group: int, queries: int, itemsize: int, fp8: bool) -> Tile:
    """itemsize: bytes of an element in the products, 4 for float32; fp8: of the cache."""
    group = min(group, MOST_ROWS)
    rows = max(16, _power_of_2(queries * group))
    if itemsize == 4:
        return Tile(rows, 16, queries, group, 8, 3 if head_dim <= 128 else 2)
    if head_dim <= 64:
        return Tile(rows, 64, queries, group, 4 if rows < 64 else 8, 3)
    wide = head_dim > 128
    keys = 16 if wide and rows >= 64 else 32 if wide or fp8 or rows >= 64 else 64
    return Tile(rows, keys, queries, group, 8 if rows >= (32 if wide else 64) else 4, 3)


def chunk_tile(head_dim: int, group: int, itemsize: int, fp8: bool) -> Tile:
    if itemsize == 4:
        rows, keys = 32 if head_dim <= 128 else 16, 16
    elif head_dim <= 128:
        rows, keys = 128, 64 if head_dim <= 64 else 32
    elif fp8:
        rows, keys = 32, 32
    else:
        rows, keys = 64, 16
    group = min(group, rows)
    return Tile(rows, keys, rows // group, group, 8, 3)


def head_tiles(num_heads: int, kv_heads: int, group: int) -> int:
    """Programs side by side: for each key/value head, its query heads by `group`."""
    return kv_heads * -(-(num_heads // kv_heads) // group)


def plan_splits(num_sequences: int, head_tiles: int, max_context_len: int, num_sms: int) -> Splits:
    room = max(1, min(_MOST_SPLITS, -(-max_context_len // _SHORTEST_SPLIT)))
    programs = max(_FEWEST_PROGRAMS, _LAUNCHES_PER_SM * num_sms // max(1, num_sequences * head_tiles))
    return Splits(_MOST_SPLITS, _SHORTEST_SPLIT, room, min(programs, room))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
