"""Attention of sequences with few new tokens: keys split over programs, the parts merged by another kernel.

(Flash-Decoding, Dao et al. 2023, with the split length worked out on the device from the real lengths.)
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.paged_attention.tiles import LOG2_E, fold, load_query

_LANES = tl.constexpr(256)  # sequences looked at together
_PARTS = tl.constexpr(16)  # parts merged together


@triton.jit
def _first_seen(context, new, window, HAS_WINDOW: tl.constexpr):
    """Position of the first key that any of the sequence's new tokens sees."""
    if HAS_WINDOW:
        return tl.maximum(context - new - window + 1, 0)
    else:
        return context * 0


@triton.jit
def _split_length(
    starts,
    contexts,
    num_sequences,
    seen,
    window,
    wanted_splits,
    max_splits,
    shortest,
    QUERIES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Keys of one split, so that all sequences' splits are about `wanted_splits`, and this one's `max_splits`
    at most. `seen` is this sequence's number of keys."""
    sums = tl.zeros([_LANES], dtype=tl.int32)
    for first in range(0, num_sequences, _LANES):
        i = first + tl.arange(0, _LANES)
        exists = i < num_sequences
        start = tl.load(starts + i, mask=exists, other=0)
        new = tl.load(starts + i + 1, mask=exists, other=0) - start
        context = tl.load(contexts + i, mask=exists, other=0)
        served = (new > 0) & (new <= QUERIES)
        sums += tl.where(served, context - _first_seen(context, new, window, HAS_WINDOW), 0)
    even = tl.cdiv(tl.sum(sums, axis=0), wanted_splits)
    least = tl.cdiv(seen, max_splits)
    return tl.cdiv(tl.maximum(even, least), shortest) * shortest


@triton.jit(do_not_specialize=["num_sequences", "window", "wanted_splits", "max_splits", "shortest"])
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
    num_sequences,
    window,
    wanted_splits,
    max_splits,
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
    """One split of one sequence with at most QUERIES new tokens, for the query heads of one key/value head.

    A sequence of one split goes to `out` straight away. Else its parts go to parts [S, QUERIES, NUM_HEADS,
    max_splits, HEAD_DIM] and part_stats [..., 2], the peak and the sum of its weights, for `merge_parts`.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // HEAD_TILES
    split = tl.program_id(2)
    row = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - row
    context = tl.load(contexts + sequence)
    if (context <= 0) | (new <= 0) | (new > QUERIES):
        return
    first = _first_seen(context, new, window, HAS_WINDOW)
    length = _split_length(
        starts, contexts, num_sequences, context - first, window, wanted_splits, max_splits, shortest,
        QUERIES, HAS_WINDOW,
    )  # fmt: skip
    begin = first + split * length
    if begin >= context:
        return
    stop = tl.minimum(begin + length, context)

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

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Counted from 0, for the sake of the pointers' alignment; see chunk.py.
    for i in range(tl.cdiv(stop - begin, BLOCK_N)):
        start = begin + i * BLOCK_N
        acc, peak, total = fold(
            acc, peak, total, rows, positions, slope, keys, table, start, stop, score_scale, soft_cap, window,
            block_stride, slot_stride, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE,
            True, HAS_WINDOW, HAS_CAP, HAS_SLOPES, FP8,
        )  # fmt: skip
    acc *= out_scale
    mask = row_mask[:, None] & (d < HEAD_DIM)[None, :]
    if (split == 0) & (stop == context):
        target = (row + token).to(tl.int64) * NUM_HEADS + head
        result = acc / tl.where(row_mask, total, 1.0)[:, None]
        tl.store(out + target[:, None] * HEAD_DIM + d[None, :], result.to(out.dtype.element_ty), mask=mask)
    else:
        part = ((sequence * QUERIES + token) * NUM_HEADS + head) * max_splits + split
        tl.store(parts + part[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
        tl.store(part_stats + part * 2, peak, mask=row_mask)
        tl.store(part_stats + part * 2 + 1, total, mask=row_mask)


@triton.jit(do_not_specialize=["num_sequences", "window", "wanted_splits", "max_splits", "shortest"])
def merge_parts(
    parts,
    part_stats,
    out,
    starts,
    contexts,
    num_sequences,
    window,
    wanted_splits,
    max_splits,
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
    length = _split_length(
        starts, contexts, num_sequences, seen, window, wanted_splits, max_splits, shortest,
        QUERIES, HAS_WINDOW,
    )  # fmt: skip
    num_splits = tl.cdiv(seen, length)
    if num_splits <= 1:
        return
    d = tl.arange(0, BLOCK_D)
    first_part = ((sequence * QUERIES + token) * NUM_HEADS + head) * max_splits
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
