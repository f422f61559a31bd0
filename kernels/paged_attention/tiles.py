"""What the attention kernels share: one tile of keys and values folded into the rows of a query tile."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.paged_attention.fp8 import from_e4m3

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(pointers, row_mask, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] with zeros for masked rows and for d >= HEAD_DIM."""
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers, mask=row_mask[:, None], other=0)
    else:
        return tl.load(pointers, mask=row_mask[:, None] & (d < HEAD_DIM)[None, :], other=0)


@triton.jit
def load_query(pointers, row_mask, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr):
    """Query rows in the type of the products: that of the keys as they come out of `_widen`."""
    rows = load_rows(pointers, row_mask, d, HEAD_DIM, BLOCK_D)
    if FP8 and rows.dtype != tl.float32:
        nan: tl.constexpr = tl.PropagateNan.ALL
        rows = tl.maximum(rows.to(tl.float32), -65504.0, propagate_nan=nan)
        rows = tl.minimum(rows, 65504.0, propagate_nan=nan).to(tl.float16)
    return rows


@triton.jit
def _load_tokens(pointers, exists, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return load_rows(pointers, exists, d, HEAD_DIM, BLOCK_D)
    elif HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0)


@triton.jit
def _widen(tile, like, FP8: tl.constexpr):
    if FP8:
        return from_e4m3(tile).to(like.dtype)
    else:
        return tile


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def load_blocks(table, positions, stop, BLOCK_SIZE: tl.constexpr):
    """Table entries of the blocks in which keys at `positions` lie; 0 for those from `stop` on."""
    return tl.load(table + positions // BLOCK_SIZE, mask=positions < stop, other=0)


@triton.jit
def fold(
    acc,
    peak,
    total,
    block,
    query,
    positions_of_rows,
    slope,
    keys,
    table,
    start,
    stop,
    score_scale,
    soft_cap,
    window,
    block_stride,
    slot_stride,
    value_offset,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    FP8: tl.constexpr,
):
    """Online softmax over keys [start, start + BLOCK_N), in base 2: (acc, peak, total) after them, and the
    `block` of the BLOCK_N keys that follow.

    block [BLOCK_N]: `load_blocks` of these keys. It comes from the step before so that Triton's pipeliner,
    which sees through no second indirection, loads keys and values ahead.
    query [M, BLOCK_D]; positions_of_rows [M], in the sequence; keys points at slot 0 of the key head, values
    lie value_offset further. MASKED: keys from `stop` on do not exist, and not every row sees every key; else
    all do. score_scale takes a product to base 2, or, with a soft cap, to a fraction of the cap.
    """
    positions = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    exists = positions < stop
    next_block = load_blocks(table, positions + BLOCK_N, stop, BLOCK_SIZE)
    slots = block.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * slot_stride
    pointers = keys + slots[:, None] + d[None, :]
    key = _widen(_load_tokens(pointers, exists, d, HEAD_DIM, BLOCK_D, MASKED), query, FP8)
    # Rows that do not exist are zero: a weight of 0 times whatever lies there need not be 0.
    value = _load_tokens(pointers + value_offset, exists, d, HEAD_DIM, BLOCK_D, MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * score_scale
    if HAS_CAP:
        scores = _tanh(scores) * (soft_cap * LOG2_E)
    if HAS_SLOPES:
        away = positions[None, :] - positions_of_rows[:, None]
        scores += slope[:, None] * away.to(tl.float32)
    if MASKED:
        seen = exists[None, :] & (positions[None, :] <= positions_of_rows[:, None])
        if HAS_WINDOW:
            seen = seen & (positions[None, :] > positions_of_rows[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    if MASKED:
        # Nothing seen yet: -inf less -inf would be NaN.
        level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        level = new_peak
    weights = tl.exp2(scores - level[:, None])
    fade = tl.exp2(peak - level)
    total = total * fade + tl.sum(weights, axis=1)
    value = _widen(value, query, FP8)
    acc = tl.dot(weights.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return acc, new_peak, total, next_block
