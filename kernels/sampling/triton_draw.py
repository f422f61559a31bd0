"""Draws one token per row by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014), in two launches.

Adding Gumbel noise to logit / temperature and taking the best draws from the softmax without computing it.
The first launch looks at chunks of the vocabulary, the second at the chunks of a row.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 - in a kernel, `and` would evaluate both sides

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.sampling.parameters import CHUNK, LANE
from penstock.kernels.sampling.triton_parts import (
    GREEDY,
    TEMPERATURE,
    gumbel,
    load_float,
    load_integer,
    load_logits,
    load_stream,
    locate_row,
    order_key,
    without_nan,
)

_BIG = tl.constexpr(2**31 - 1)


@triton.jit
def _keep(scores, x, ids, key_bound, last_id):
    key = order_key(x)
    return tl.where((key > key_bound) | ((key == key_bound) & (ids <= last_id)), scores, float("-inf"))


@triton.jit
def _first_of(s0, s1, s2, s3, best, i0, i1, i2, i3):
    """The lowest id whose score is `best`."""
    first = tl.minimum(tl.where(s0 == best, i0, _BIG), tl.where(s1 == best, i1, _BIG))
    second = tl.minimum(tl.where(s2 == best, i2, _BIG), tl.where(s3 == best, i3, _BIG))
    return tl.min(tl.minimum(first, second), axis=0)


@triton.jit
def _max_of(s0, s1, s2, s3):
    return tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), axis=0)


@triton.jit
def draw_chunks(
    logits,
    logits_stride,
    work,
    work_stride,
    source,
    slots,
    positions,
    parameters,
    bounds,
    part_scores,
    part_best,
    part_ids,
    vocab_size,
    HAS_SLOTS: tl.constexpr,
    HAS_WORK: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    RANDOM: tl.constexpr,
    LANE: tl.constexpr,
):
    """Best logit (NaN if there is one), best score relative to it and that one's id, of a row's chunk."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = 0
    if HAS_SLOTS:
        slot = tl.load(slots + row)
    if slot >= 0:
        raw, edited, is_edited = locate_row(logits, logits_stride, work, work_stride, source, row, HAS_WORK)
        lanes = tl.arange(0, LANE)
        i0 = chunk * (4 * LANE) + lanes
        i1 = i0 + LANE
        i2 = i1 + LANE
        i3 = i2 + LANE
        x0 = load_logits(raw, edited, is_edited, i0, i0 < vocab_size, HAS_WORK)
        x1 = load_logits(raw, edited, is_edited, i1, i1 < vocab_size, HAS_WORK)
        x2 = load_logits(raw, edited, is_edited, i2, i2 < vocab_size, HAS_WORK)
        x3 = load_logits(raw, edited, is_edited, i3, i3 < vocab_size, HAS_WORK)
        nans = ((x0 != x0) | (x1 != x1) | (x2 != x2) | (x3 != x3)).to(tl.int32)
        num_nans = tl.sum(nans, axis=0)
        x0 = without_nan(x0)
        x1 = without_nan(x1)
        x2 = without_nan(x2)
        x3 = without_nan(x3)
        best = _max_of(x0, x1, x2, x3)
        score = best
        chosen = _first_of(x0, x1, x2, x3, best, i0, i1, i2, i3)
        if RANDOM:
            if load_integer(parameters, slot, GREEDY) == 0:
                # Relative to the chunk's best, noise is not rounded away by large logit / temperature.
                shift = tl.where(best > float("-inf"), best, 0.0)
                temperature = load_float(parameters, slot, TEMPERATURE)
                stream = load_stream(parameters, slot)
                counter = chunk * LANE + lanes
                zero = counter * 0
                r0, r1, r2, r3 = tl.philox(stream, counter, zero + tl.load(positions + row), zero, zero)
                s0 = tl.div_rn(x0 - shift, temperature) + gumbel(r0)
                s1 = tl.div_rn(x1 - shift, temperature) + gumbel(r1)
                s2 = tl.div_rn(x2 - shift, temperature) + gumbel(r2)
                s3 = tl.div_rn(x3 - shift, temperature) + gumbel(r3)
                if HAS_BOUNDS:
                    key_bound = tl.load(bounds + 2 * row)
                    last_id = tl.load(bounds + 2 * row + 1)
                    s0 = _keep(s0, x0, i0, key_bound, last_id)
                    s1 = _keep(s1, x1, i1, key_bound, last_id)
                    s2 = _keep(s2, x2, i2, key_bound, last_id)
                    s3 = _keep(s3, x3, i3, key_bound, last_id)
                score = _max_of(s0, s1, s2, s3)
                chosen = _first_of(s0, s1, s2, s3, score, i0, i1, i2, i3)
        part = row * tl.num_programs(0) + chunk
        tl.store(part_scores + part, score)
        tl.store(part_best + part, tl.where(num_nans > 0, float("nan"), best))
        tl.store(part_ids + part, tl.minimum(chosen, vocab_size - 1))


@triton.jit
def pick(
    slots,
    parameters,
    part_scores,
    part_best,
    part_ids,
    ids,
    best_out,
    num_chunks,
    HAS_SLOTS: tl.constexpr,
    RANDOM: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The best of a row's chunks, the first of equal ones; padding rows get id 0 and best 0."""
    row = tl.program_id(0).to(tl.int64)
    slot = 0
    if HAS_SLOTS:
        slot = tl.load(slots + row)
    if slot >= 0:
        chunks = tl.arange(0, CHUNKS)
        inside = chunks < num_chunks
        part = row * num_chunks
        best = tl.load(part_best + part + chunks, mask=inside, other=float("-inf"))
        num_nans = tl.sum((best != best).to(tl.int32), axis=0)
        best = without_nan(best)
        row_best = tl.max(best, axis=0)
        scores = tl.load(part_scores + part + chunks, mask=inside, other=float("-inf"))
        if RANDOM:
            if load_integer(parameters, slot, GREEDY) == 0:
                lag = tl.div_rn(best - row_best, load_float(parameters, slot, TEMPERATURE))
                scores = tl.where(best > float("-inf"), scores + lag, float("-inf"))
        scores = without_nan(scores)
        top = tl.max(scores, axis=0)
        chunk = tl.min(tl.where((scores == top) & inside, chunks, num_chunks - 1), axis=0)
        tl.store(ids + row, tl.load(part_ids + part + chunk))
        tl.store(best_out + row, tl.where(num_nans > 0, float("nan"), row_best))
    else:
        tl.store(ids + row, 0)
        tl.store(best_out + row, 0.0)


def launch_draw(
    logits: Tensor,
    slots: Tensor | None,
    positions: Tensor | None,
    parameters: Tensor | None,
    bounds: Tensor | None,
    work: Tensor | None,
    source: Tensor | None,
    ids: Tensor,
    best: Tensor,
) -> None:
    """Writes ids [R] and best [R]. Without `parameters` all are greedy, without `slots` none is padding."""
    rows, vocab_size = logits.shape
    if rows == 0:
        return
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    # Tensors of their own: a slice may not be aligned, which compiles another variant.
    part_scores = torch.empty((rows, num_chunks), dtype=torch.float32, device=logits.device)
    part_best = torch.empty_like(part_scores)
    part_ids = torch.empty((rows, num_chunks), dtype=torch.int32, device=logits.device)
    random = parameters is not None
    draw_chunks[(num_chunks, rows)](
        logits,
        logits.stride(0),
        work,
        work.stride(0) if work is not None else 0,
        source,
        slots,
        positions,
        parameters,
        bounds,
        part_scores,
        part_best,
        part_ids,
        vocab_size,
        HAS_SLOTS=slots is not None,
        HAS_WORK=work is not None,
        HAS_BOUNDS=bounds is not None,
        RANDOM=random,
        LANE=LANE,
        num_warps=4,
        enable_fp_fusion=False,  # all variants round alike
    )
    pick[(rows,)](
        slots,
        parameters,
        part_scores,
        part_best,
        part_ids,
        ids,
        best,
        num_chunks,
        HAS_SLOTS=slots is not None,
        RANDOM=random,
        CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=1,
        enable_fp_fusion=False,
    )
