"""Attention of prefill chunks over their own keys and what came before: a program per tile of query rows."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.paged_attention.tiles import LOG2_E, fold, load_blocks, load_query

_LANES = tl.constexpr(256)  # sequences looked at together


@triton.jit
def _sequence_of(tile, starts, num_sequences, TILE_TOKENS: tl.constexpr):
    """Sequence i's tiles are numbered from starts[i] // TILE_TOKENS + i: in order, with gaps, none twice."""
    before = tl.zeros([_LANES], dtype=tl.int32)
    for first in range(0, num_sequences, _LANES):
        i = first + tl.arange(0, _LANES)
        exists = i < num_sequences
        start = tl.load(starts + i, mask=exists, other=0)
        before += (exists & (start // TILE_TOKENS + i <= tile)).to(tl.int32)
    return tl.sum(before, axis=0) - 1


@triton.jit(do_not_specialize=["num_sequences", "window", "table_stride"])
def chunk_attention(
    query,
    cache,
    tables,
    starts,
    contexts,
    slopes,
    out,
    num_sequences,
    window,
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
    TILE_TOKENS: tl.constexpr,
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
    """TILE_TOKENS new tokens of one sequence with more than one, for the query heads of a key/value head."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    # A sequence's last tiles have the most keys: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // HEAD_TILES
    sequence = _sequence_of(tile, starts, num_sequences, TILE_TOKENS).to(tl.int64)
    row = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - row
    context = tl.load(contexts + sequence)
    first_token = (tile - row // TILE_TOKENS - sequence.to(tl.int32)) * TILE_TOKENS
    if (context <= 0) | (new <= 1) | (first_token >= new):
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = first_token + m // GROUP_TILE
    in_group = (tl.program_id(1) % HEAD_TILES) * GROUP_TILE + m % GROUP_TILE
    head = kv_head * GROUP + in_group
    row_mask = (m < TILE_TOKENS * GROUP_TILE) & (token < new) & (in_group < GROUP)
    query_offsets = (row + token).to(tl.int64) * query_token_stride + head * query_head_stride
    rows = load_query(query + query_offsets[:, None] + d[None, :], row_mask, d, HEAD_DIM, BLOCK_D, FP8)
    positions = context - new + token
    slope = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=row_mask, other=0.0) * LOG2_E
    keys = cache + kv_head * HEAD_DIM
    table = tables + sequence * table_stride

    # Keys of [all_from, all_to) are seen by every row, and those before `begin` and from `stop` on by none.
    first_position = context - new + first_token
    stop = tl.minimum(first_position + TILE_TOKENS, context)
    begin = 0
    all_from = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0)
        all_from = begin + tl.cdiv(tl.maximum(stop - window - begin, 0), BLOCK_N) * BLOCK_N
    all_to = all_from + tl.maximum(first_position + 1 - all_from, 0) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Counted from 0: with a bound as the first `start`, Triton (3.6, 3.7) loses the alignment of the cache's
    # pointers and loads element by element.
    n = tl.arange(0, BLOCK_N)
    if HAS_WINDOW:
        block = load_blocks(table, begin + n, stop, BLOCK_SIZE)
        for i in range(tl.cdiv(tl.minimum(all_from, stop) - begin, BLOCK_N)):
            start = begin + i * BLOCK_N
            acc, peak, total, block = fold(
                acc, peak, total, block, rows, positions, slope, keys, table, start, stop, score_scale,
                soft_cap, window, block_stride, slot_stride, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N,
                BLOCK_SIZE, True, HAS_WINDOW, HAS_CAP, HAS_SLOPES, FP8,
            )  # fmt: skip
    block = load_blocks(table, all_from + n, stop, BLOCK_SIZE)
    for i in range((all_to - all_from) // BLOCK_N):
        start = all_from + i * BLOCK_N
        acc, peak, total, block = fold(
            acc, peak, total, block, rows, positions, slope, keys, table, start, stop, score_scale, soft_cap,
            window, block_stride, slot_stride, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE,
            False, HAS_WINDOW, HAS_CAP, HAS_SLOPES, FP8,
        )  # fmt: skip
    block = load_blocks(table, all_to + n, stop, BLOCK_SIZE)
    for i in range(tl.cdiv(stop - all_to, BLOCK_N)):
        start = all_to + i * BLOCK_N
        acc, peak, total, block = fold(
            acc, peak, total, block, rows, positions, slope, keys, table, start, stop, score_scale, soft_cap,
            window, block_stride, slot_stride, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE,
            True, HAS_WINDOW, HAS_CAP, HAS_SLOPES, FP8,
        )  # fmt: skip
    result = acc * (out_scale / tl.where(row_mask, total, 1.0))[:, None]
    target = (row + token).to(tl.int64) * NUM_HEADS + head
    mask = row_mask[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out + target[:, None] * HEAD_DIM + d[None, :], result.to(out.dtype.element_ty), mask=mask)
