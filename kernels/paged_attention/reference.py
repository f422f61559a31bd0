"""Paged attention in plain torch, one sequence at a time in float32: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.paged_attention.batch import AttentionBatch


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
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    groups = query.shape[1] // kv_cache.shape[3]
    start = 0
    for row, (length, context) in enumerate(zip(*batch.on_host(), strict=True)):
        if not length or not context:  # padding
            continue
        num_blocks = -(-context // batch.block_size)
        blocks = kv_cache[batch.block_tables[row, :num_blocks].long()]
        # [context, 2, kv_heads, head_dim] -> [context, heads, head_dim] each
        keys, values = blocks.flatten(0, 1)[:context].float().repeat_interleave(groups, dim=2).unbind(dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[start : start + length].float(), keys) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if slopes is not None:
            away = distances(context - length, length, 0, context, query.device)
            scores = scores + slopes[:, None, None] * away
        hidden = ~visible(context - length, length, 0, context, window, query.device)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start : start + length] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
        start += length
    return out


def visible(
    first_query: int,
    num_queries: int,
    first_key: int,
    num_keys: int,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query sees, bool [num_queries, num_keys]; arguments are positions in the sequence."""
    away = distances(first_query, num_queries, first_key, num_keys, device)
    return away <= 0 if window is None else (away <= 0) & (away > -window)


def distances(
    first_query: int, num_queries: int, first_key: int, num_keys: int, device: torch.device
) -> Tensor:
    """Position of each key less that of each query, int64 [num_queries, num_keys]."""
    queries = torch.arange(first_query, first_query + num_queries, device=device).unsqueeze(1)
    return torch.arange(first_key, first_key + num_keys, device=device).unsqueeze(0) - queries
