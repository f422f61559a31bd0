"""Pieces that the Triton kernels of this folder share: loads, order keys, parameters, noise."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.sampling import parameters as layout

WIDTH = tl.constexpr(layout.WIDTH)
GREEDY = tl.constexpr(layout.GREEDY)
FILTERED = tl.constexpr(layout.FILTERED)
TEMPERATURE = tl.constexpr(layout.TEMPERATURE)
TOP_K = tl.constexpr(layout.TOP_K)
TOP_P = tl.constexpr(layout.TOP_P)
MIN_OFFSET = tl.constexpr(layout.MIN_OFFSET)
STREAM_LOW = tl.constexpr(layout.STREAM_LOW)
STREAM_HIGH = tl.constexpr(layout.STREAM_HIGH)
FIRST_KEY = tl.constexpr(layout.FIRST_KEY)
NO_LIMIT = tl.constexpr(layout.NO_LIMIT)
INFINITELY_LOW = tl.constexpr(-2139095041)  # the order key of -inf
_TO_UNIT = tl.constexpr(2.0**-32)
_SMALL = tl.constexpr(2.0**-6)


@triton.jit
def load_integer(parameters, slot, FIELD: tl.constexpr):
    return tl.load(parameters + slot.to(tl.int64) * WIDTH + FIELD)


@triton.jit
def load_float(parameters, slot, FIELD: tl.constexpr):
    return load_integer(parameters, slot, FIELD).to(tl.float32, bitcast=True)


@triton.jit
def load_stream(parameters, slot):
    low = load_integer(parameters, slot, STREAM_LOW).to(tl.int64) & 0xFFFFFFFF
    return (load_integer(parameters, slot, STREAM_HIGH).to(tl.int64) << 32) | low


@triton.jit
def locate_row(logits, logits_stride, work, work_stride, source, row, HAS_WORK: tl.constexpr):
    """Where a row's logits are: its place in `logits`, its place in `work`, and whether the second counts."""
    raw = logits + row * logits_stride
    edited = raw
    is_edited = row < 0
    if HAS_WORK:
        place = tl.load(source + row).to(tl.int64)
        is_edited = place >= 0
        edited = work + tl.maximum(place, 0) * work_stride
    return raw, edited, is_edited


@triton.jit
def load_logits(raw, edited, is_edited, ids, mask, HAS_WORK: tl.constexpr):
    """Logits as float32, -inf outside the mask."""
    if HAS_WORK:
        if is_edited:
            x = tl.load(edited + ids, mask=mask, other=float("-inf"))
        else:
            x = tl.load(raw + ids, mask=mask, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(raw + ids, mask=mask, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def without_nan(x):
    return tl.where(x != x, float("-inf"), x)


@triton.jit
def order_key(x):
    """int32 keys ordered like the floats; both zeros have one key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def gumbel(random):
    """-log(-log(1 - v)) for v = (random + 0.5) / 2**32, random uint32; relative error small for every v."""
    v = (random.to(tl.float32) + 0.5) * _TO_UNIT
    rest = ((random ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * _TO_UNIT
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))
    return -tl.log(tl.where(v < _SMALL, series, -tl.log(rest)))
