"""Tile sizes of the attention kernels by shape, dtype and device generation; plain arithmetic, no tensors.

Shared memory stays within 99 KiB, what every device from sm_80 on has.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_ROWS = 64  # of a split's tile: more are a chunk's
_QUERIES = (1, 2, 4, 8, 16)  # new tokens that a split takes; few values, for each is a compile
_PROGRAMS_PER_SM = 4
_LAUNCHES_PER_SM = 16  # programs launched, most of them to exit at once
_FEWEST_SPLITS, _MOST_SPLITS = 4, 64
SHORTEST_SPLIT = 128  # keys; also what lengths are rounded up to


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
    wanted: int  # splits of all sequences together, for one key/value head
    most: int  # splits of one sequence
    shortest: int  # keys


def queries_of_splits(max_query_len: int, group: int) -> int:
    """New tokens of a sequence that the split kernel takes; 0 when one of `max_query_len` has too many."""
    group = min(group, MOST_ROWS)
    return next((n for n in _QUERIES if n >= max_query_len and n * group <= MOST_ROWS), 0)


def split_tile(head_dim: int, group: int, queries: int, itemsize: int) -> Tile:
    """itemsize: bytes of an element in the products, 4 for float32."""
    group = min(group, MOST_ROWS)
    rows = max(16, _power_of_2(queries * group))
    if itemsize == 4:
        return Tile(rows, 16, queries, group, 8, 2)
    keys = 32 if head_dim > 128 else 64
    return Tile(rows, keys, queries, group, 4, 3 if head_dim <= 128 else 2)


def chunk_tile(head_dim: int, group: int, itemsize: int) -> Tile:
    if itemsize == 4:
        rows, keys, num_warps, num_stages = 32, 16, 8, 1
    elif head_dim <= 64:
        rows, keys, num_warps, num_stages = 128, 64, 8, 3
    elif head_dim <= 128:
        rows, keys, num_warps, num_stages = 128, 64, 8, 2
    else:
        rows, keys, num_warps, num_stages = 64, 32, 8, 2
    group = min(group, rows)
    return Tile(rows, keys, rows // group, group, num_warps, num_stages)


def head_tiles(num_heads: int, kv_heads: int, group: int) -> int:
    """Programs side by side: for each key/value head, its query heads by `group`."""
    return kv_heads * -(-(num_heads // kv_heads) // group)


def plan_splits(num_sequences: int, head_tiles: int, max_context_len: int, num_sms: int) -> Splits:
    launches = _LAUNCHES_PER_SM * num_sms // max(1, num_sequences * head_tiles)
    most = min(max(launches, _FEWEST_SPLITS), _MOST_SPLITS, -(-max_context_len // SHORTEST_SPLIT))
    return Splits(max(1, _PROGRAMS_PER_SM * num_sms // head_tiles), max(1, most), SHORTEST_SPLIT)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
