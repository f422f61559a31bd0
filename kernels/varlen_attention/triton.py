"""Varlen attention for CUDA devices: a program per block of an input's rows and query head."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.specialization import Specialization
from penstock.kernels.varlen_attention.reference import check

_LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["before", "after", "reach"])
def _attend(
    query,
    key,
    value,
    out,
    starts,
    bias,
    scale,
    before,
    after,
    reach,
    query_stride,
    key_stride,
    value_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Online softmax in base 2: `scale` and `bias` take products to it. Blocks are cut by positions in the
    input, whatever lies beside it."""
    entry, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + entry).to(tl.int64)
    length = (tl.load(starts + entry + 1) - start).to(tl.int32)
    first_row = tl.program_id(2) * BLOCK_M
    if first_row >= length:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row_exists = (rows < length)[:, None] & (d < HEAD_DIM)[None, :]
    at = query + (start + rows)[:, None] * query_stride + head * HEAD_DIM + d[None, :]
    q = tl.load(at, mask=row_exists, other=0.0)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = tl.maximum(first_row - before, 0) // BLOCK_N * BLOCK_N
    high = tl.minimum(length, first_row + BLOCK_M + after)
    for first_key in range(low, high, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        exists = (keys < length)[:, None] & (d < HEAD_DIM)[None, :]
        offset = (head // GROUP) * HEAD_DIM + d[None, :]
        k = tl.load(key + (start + keys)[:, None] * key_stride + offset, mask=exists, other=0.0)
        v = tl.load(value + (start + keys)[:, None] * value_stride + offset, mask=exists, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        away = keys[None, :] - rows[:, None]
        if HAS_BIAS:
            place = tl.minimum(tl.maximum(away, -reach), reach) + reach
            scores += tl.load(bias + head * (2 * reach + 1) + place)
        seen = (keys < length)[None, :] & (away >= -before) & (away <= after)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        # Nothing seen yet: -inf less -inf would be NaN.
        level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - level[:, None])
        fade = tl.exp2(peak - level)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = new_peak
    acc = acc / tl.where(rows < length, total, 1.0)[:, None]
    to = out + ((start + rows)[:, None] * NUM_HEADS + head) * HEAD_DIM + d[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=row_exists)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    before: int | None = None,
    after: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    check(query, key, value, lengths)
    tokens, heads, head_dim = query.shape
    if any(x.stride(2) != 1 or x.stride(1) != head_dim for x in (query, key, value)):
        raise ValueError("the elements of a head, and the heads of a token, must lie one after the other")
    out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
    longest = max(lengths)
    constexprs, options = _tile(heads, heads // key.shape[1], head_dim, query.element_size())
    grid = (len(lengths), heads, triton.cdiv(longest, constexprs["BLOCK_M"]))
    _attend[grid](
        *(query, key, value, out, starts),
        None if bias is None else bias.float().contiguous() * _LOG2_E,
        scale * _LOG2_E,
        longest if before is None else before,
        longest if after is None else after,
        0 if bias is None else bias.shape[1] // 2,
        *(query.stride(0), key.stride(0), value.stride(0)),
        **constexprs,
        HAS_BIAS=bias is not None,
        **options,
    )
    return out


def _tile(heads: int, group: int, head_dim: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constexprs and options of a launch; itemsize: bytes of an element, 4 for float32."""
    wide = head_dim > 64
    rows, keys = (32, 16 if wide else 32) if itemsize == 4 else (64, 32 if wide else 64)
    constexprs = {
        "NUM_HEADS": heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": rows,
        "BLOCK_N": keys,
    }
    return constexprs, {"num_warps": 4, "num_stages": 2}


def specializations() -> list[Specialization]:
    shapes = ((12, 12, 32), (12, 12, 64), (16, 16, 64), (32, 8, 128))
    found = [_specialize("bf16", *shape, False) for shape in shapes]
    return [*found, _specialize("fp32", 12, 12, 32, False), _specialize("bf16", 12, 12, 64, True)]


def _specialize(dtype: str, heads: int, kv_heads: int, head_dim: int, has_bias: bool) -> Specialization:
    constexprs, options = _tile(heads, heads // kv_heads, head_dim, 4 if dtype == "fp32" else 2)
    values: dict[str, object] = {**constexprs, "HAS_BIAS": has_bias}
    pointers: dict[str, str] = dict.fromkeys(("query", "key", "value", "out"), f"*{dtype}")
    strides = ("query_stride", "key_stride", "value_stride")
    signature = {
        **pointers,
        "starts": "*i32",
        "bias": "*fp32" if has_bias else "constexpr",
        "scale": "fp32",
        **dict.fromkeys(("before", "after", "reach", *strides), "i32"),
        **dict.fromkeys(values, "constexpr"),
    }
    if not has_bias:
        values["bias"] = None
    return Specialization(
        name=f"{dtype} d{head_dim} g{heads // kv_heads}{' bias' if has_bias else ''}",
        kernel=_attend,
        signature=signature,
        constexprs=values,
        aligned=("query", "key", "value", "out", "starts", *strides),
        options=options,
    )
