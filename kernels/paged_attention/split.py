"""Attention of sequences with few new tokens: keys split over programs, the parts merged by another kernel.

(Flash-Decoding, Dao et al. 2023.) Where a sequence is split depends on its own length alone, so that its
result does not change with the sequences beside it, nor with the bounds that a launch is made for.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.paged_attention.tiles import LOG2_E, fold, load_blocks, load_query

_PARTS = tl.constexpr(16)  # parts merged together


@triton.jit
def _first_seen(context, new, window, HAS_WINDOW: tl.constexpr):
    """Position of the first key that any of the sequence's new tokens sees."""
    if HAS_WINDOW:
        return tl.maximum(context - new - window + 1, 0)
    else:
        return context * 0


@triton.jit
def _split_length(seen, most_splits, shortest):
    """Keys of one split of a sequence that has `seen`: a multiple of `shortest`."""
    return tl.cdiv(tl.cdiv(seen, most_splits), shortest) * shortest


@triton.jit(do_not_specialize=["window", "room", "most_splits", "shortest", "table_stride"])
def split_attention(
    query,
    cache,
    tables,
    starts,
    contexts,
    slopes,
    out,
    parts,
    part_stats,
    window,
    room,
    most_splits,
    shortest,
    score_scale,
    soft_cap,
    out_scale,
    query_token_stride,
    query_head_stride,
    block_stride,
    slot_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    FP8: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Every so many splits of one sequence with at most QUERIES new tokens, for the query heads of one
    key/value head.

    A sequence of one split goes to `out` straight away. Else its parts go to parts [S, QUERIES, NUM_HEADS,
    room, HEAD_DIM] and part_stats [..., 2], the peak and the sum of its weights, for `merge_parts`.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // HEAD_TILES
    row = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - row
    context = tl.load(contexts + sequence)
    if (context <= 0) | (new <= 0) | (new > QUERIES):
        return
    first = _first_seen(context, new, window, HAS_WINDOW)
    seen = context - first
    length = _split_length(seen, most_splits, shortest)
    num_splits = tl.cdiv(seen, length)
    if tl.program_id(2) >= num_splits:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = m // GROUP_TILE
    in_group = (tl.program_id(1) % HEAD_TILES) * GROUP_TILE + m % GROUP_TILE
    head = kv_head * GROUP + in_group
    row_mask = (token < new) & (in_group < GROUP)
    query_offsets = (row + token).to(tl.int64) * query_token_stride + head * query_head_stride
    rows = load_query(query + query_offsets[:, None] + d[None, :], row_mask, d, HEAD_DIM, BLOCK_D, FP8)
    positions = context - new + token
    slope = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=row_mask, other=0.0) * LOG2_E
    keys = cache + kv_head * HEAD_DIM
    table = tables + sequence * table_stride

    n = tl.arange(0, BLOCK_N)
    mask = row_mask[:, None] & (d < HEAD_DIM)[None, :]

    for split in range(tl.program_id(2), num_splits, tl.num_programs(2)):
        begin = first + split * length
        stop = tl.minimum(begin + length, context)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        block = load_blocks(table, begin + n, stop, BLOCK_SIZE)
        # Counted from 0, for the sake of the pointers' alignment; see chunk.py.
        for i in range(tl.cdiv(stop - begin, BLOCK_N)):
            start = begin + i * BLOCK_N
            acc, peak, total, block = fold(
                acc, peak, total, block, rows, positions, slope, keys, table, start, stop, score_scale,
                soft_cap, window, block_stride, slot_stride, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N,
                BLOCK_SIZE, True, HAS_WINDOW, HAS_CAP, HAS_SLOPES, FP8,
            )  # fmt: skip
        acc *= out_scale
        if num_splits == 1:
            target = (row + token).to(tl.int64) * NUM_HEADS + head
            result = acc / tl.where(row_mask, total, 1.0)[:, None]
            pointers = out + target[:, None] * HEAD_DIM + d[None, :]
            tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)
        else:
            part = ((sequence * QUERIES + token) * NUM_HEADS + head) * room + split
            tl.store(parts + part[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
            tl.store(part_stats + part * 2, peak, mask=row_mask)
            tl.store(part_stats + part * 2 + 1, total, mask=row_mask)


@triton.jit(do_not_specialize=["window", "room", "most_splits", "shortest"])
def merge_parts(
    parts,
    part_stats,
    out,
    starts,
    contexts,
    window,
    room,
    most_splits,
    shortest,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of one new token of a sequence that was split; parts that nobody wrote are not read."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sequence = (tl.program_id(0) // QUERIES).to(tl.int64)
    token = tl.program_id(0) % QUERIES
    head = tl.program_id(1)
    row = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - row
    context = tl.load(contexts + sequence)
    if (context <= 0) | (new > QUERIES) | (token >= new):
        return
    seen = context - _first_seen(context, new, window, HAS_WINDOW)
    num_splits = tl.cdiv(seen, _split_length(seen, most_splits, shortest))
    if num_splits <= 1:
        return
    d = tl.arange(0, BLOCK_D)
    first_part = ((sequence * QUERIES + token) * NUM_HEADS + head) * room
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    peak = float("-inf")
    total = 0.0
    for first in range(0, num_splits, _PARTS):
        i = first + tl.arange(0, _PARTS)
        exists = i < num_splits
        stats = part_stats + (first_part + i) * 2
        part_peak = tl.load(stats, mask=exists, other=float("-inf"))
        part_total = tl.load(stats + 1, mask=exists, other=0.0)
        mask = exists[:, None] & (d < HEAD_DIM)[None, :]
        part = tl.load(parts + (first_part + i)[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(part_peak, axis=0))
        # A part in which this token sees no key has a peak of -inf, and weight 0.
        level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        fade = tl.exp2(peak - level)
        weight = tl.exp2(part_peak - level)
        total = total * fade + tl.sum(part_total * weight, axis=0)
        acc = acc * fade + tl.sum(part * weight[:, None], axis=0)
        peak = new_peak
    target = ((row + token).to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + d
    tl.store(out + target, (acc / total).to(out.dtype.element_ty), mask=d < HEAD_DIM)
