"""Varlen attention by the native library; what it does not have is the torch path's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.native.library import DTYPES, FLOAT, INT, INT64, POINTER, bind, check
from penstock.kernels.varlen_attention import cpu
from penstock.kernels.varlen_attention.reference import check as check_shapes

_MOST_DIMS = 256

_attention = bind(
    __name__, "_attention", "varlen_attention", *[POINTER] * 6, *[INT64] * 10, FLOAT, INT, INT
)  # fmt: skip


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
    if not _suits(query, key, value):
        return cpu.varlen_attention(
            query, key, value, starts, lengths, scale=scale, before=before, after=after, bias=bias
        )
    check_shapes(query, key, value, lengths)
    tokens, heads, head_dim = query.shape
    starts = starts.int().contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    out = query.new_empty((tokens, heads, head_dim))
    check(
        _attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            starts.data_ptr(),
            None if bias is None else bias.data_ptr(),
            query.stride(0),
            key.stride(0),
            value.stride(0),
            len(lengths),
            heads,
            key.shape[1],
            head_dim,
            -1 if before is None else before,
            -1 if after is None else after,
            0 if bias is None else bias.shape[1] // 2,
            scale,
            DTYPES[query.dtype],
            torch.get_num_threads(),
        )
    )
    return out


def _suits(query: Tensor, *others: Tensor) -> bool:
    """One type that the library has, and the heads of a token one after the other."""
    head_dim = query.shape[2]
    if query.dtype not in DTYPES or head_dim > _MOST_DIMS or head_dim % 2:
        return False
    return all(
        x.dtype is query.dtype and x.stride(2) == 1 and x.stride(1) == head_dim for x in (query, *others)
    )
