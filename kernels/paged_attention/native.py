"""Paged attention by the native library over a cache of tiles (see kv_write/native.py); any other cache, the
torch path's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.native.library import DTYPES, FLOAT, INT, INT64, POINTER, bind, check
from penstock.kernels.paged_attention import cpu
from penstock.kernels.paged_attention.batch import AttentionBatch

_TILED_DIMS = 4
_PREPARED = "native"

_paged_attention = bind(
    __name__, "_paged_attention", "paged_attention",
    *[POINTER] * 6, *[INT64] * 9, FLOAT, FLOAT, POINTER, INT, INT,
)  # fmt: skip


@dataclass(slots=True)
class _Lengths:
    """What the library reads of a batch, kept alive: int64, contiguous."""

    queries: Tensor
    contexts: Tensor
    tables: Tensor


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    if kv_cache.dim() != _TILED_DIMS:
        return cpu.paged_attention(
            query, kv_cache, batch, scale=scale, window=window, soft_cap=soft_cap, slopes=slopes
        )
    lengths = batch.prepared.get(_PREPARED)
    if not isinstance(lengths, _Lengths):
        lengths = batch.prepared[_PREPARED] = _lengths(batch)
    tokens, num_heads, head_dim = query.shape
    if query.dtype is not kv_cache.dtype or query.stride(1) != head_dim or query.stride(2) != 1:
        raise ValueError("query heads must have the cache's dtype and lie one after the other")
    if slopes is not None:
        slopes = slopes.float().contiguous()
    out = query.new_empty((tokens, num_heads, head_dim))
    check(
        _paged_attention(
            query.data_ptr(),
            kv_cache.data_ptr(),
            out.data_ptr(),
            lengths.queries.data_ptr(),
            lengths.contexts.data_ptr(),
            lengths.tables.data_ptr(),
            query.stride(0),
            lengths.tables.shape[1],
            lengths.queries.shape[0],
            num_heads,
            kv_cache.shape[1],
            head_dim,
            kv_cache.shape[0],
            batch.block_size,
            window or 0,
            scale,
            soft_cap or 0.0,
            None if slopes is None else slopes.data_ptr(),
            DTYPES[query.dtype],
            torch.get_num_threads(),
        )
    )
    return out


def _lengths(batch: AttentionBatch) -> _Lengths:
    queries, contexts = batch.on_host()
    return _Lengths(torch.tensor(queries), torch.tensor(contexts), batch.block_tables.long().contiguous())
