"""Changes single logits, named by row and id, in place, and masks rows by a bit per token."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAIRS = 128
CHUNK = 4096


@triton.jit(do_not_specialize=["count"])
def penalise_pairs(
    logits, stride, rows, ids, output_counts, repetition, presence, frequency, count, PAIRS: tl.constexpr
):  # fmt: skip
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pairs < count
    place = logits + tl.load(rows + pairs, mask=inside, other=0).to(tl.int64) * stride
    place += tl.load(ids + pairs, mask=inside, other=0).to(tl.int64)
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(repetition + pairs, mask=inside, other=1.0)
    occurrences = tl.load(output_counts + pairs, mask=inside, other=0.0)
    x = tl.where(x > 0.0, tl.div_rn(x, factor), x * factor)  # rounded as torch's
    x -= tl.load(frequency + pairs, mask=inside, other=0.0) * occurrences
    x -= tl.where(occurrences > 0.0, tl.load(presence + pairs, mask=inside, other=0.0), 0.0)
    tl.store(place, x, mask=inside)


@triton.jit(do_not_specialize=["count"])
def change_pairs(
    logits, stride, rows, ids, bias, count, HAS_BIAS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Adds `bias`, or sets to -inf where there is none."""
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pairs < count
    place = logits + tl.load(rows + pairs, mask=inside, other=0).to(tl.int64) * stride
    place += tl.load(ids + pairs, mask=inside, other=0).to(tl.int64)
    x = tl.full((PAIRS,), float("-inf"), dtype=tl.float32)
    if HAS_BIAS:
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(bias + pairs, mask=inside, other=0.0)
    tl.store(place, x, mask=inside)


@triton.jit
def mask_chunks(logits, stride, bitmask, mask_stride, rows, vocab_size, CHUNK: tl.constexpr):
    place = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab_size
    words = tl.load(bitmask + place * mask_stride + ids // 32, mask=inside, other=0)
    forbidden = ((words >> (ids % 32)) & 1) == 0
    row = logits + tl.load(rows + place).to(tl.int64) * stride
    nothing = tl.full((CHUNK,), float("-inf"), dtype=tl.float32)
    tl.store(row + ids, nothing, mask=inside & forbidden)


def launch_penalties(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    count = rows.numel()
    if count:
        penalise_pairs[(triton.cdiv(count, PAIRS),)](
            logits,
            logits.stride(0),
            rows,
            ids,
            output_counts,
            repetition,
            presence,
            frequency,
            count,
            PAIRS=PAIRS,
            num_warps=4,
        )


def launch_pairs(logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor | None) -> None:
    count = rows.numel()
    if count:
        change_pairs[(triton.cdiv(count, PAIRS),)](
            logits,
            logits.stride(0),
            rows,
            ids,
            bias,
            count,
            HAS_BIAS=bias is not None,
            PAIRS=PAIRS,
            num_warps=4,
        )


def launch_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    if rows.numel():
        mask_chunks[(triton.cdiv(logits.shape[1], CHUNK), rows.numel())](
            logits,
            logits.stride(0),
            bitmask,
            bitmask.stride(0),
            rows,
            logits.shape[1],
            CHUNK=CHUNK,
            num_warps=4,
        )
