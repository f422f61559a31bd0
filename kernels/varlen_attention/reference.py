"""Varlen attention in plain torch, one input at a time in float32: the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    groups = query.shape[1] // key.shape[1]
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        keys = key[own].float().repeat_interleave(groups, dim=1)
        values = value[own].float().repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[own].float(), keys) * scale
        if bias is not None:
            scores = scores + bias_of(bias, length)
        scores = scores.masked_fill(hidden_of(length, before, after, query.device), float("-inf"))
        out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values).to(query.dtype)
        start += length
    return out


def check(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> None:
    """Raises ValueError where the lengths are not those of the tensors, or heads do not divide."""
    if sum(lengths) != len(query) or min(lengths, default=1) < 1:
        raise ValueError(f"lengths of {sum(lengths)} tokens for {len(query)} of them")
    if key.shape != value.shape or len(key) != len(query) or query.shape[1] % key.shape[1]:
        raise ValueError(f"keys {list(key.shape)} do not go with queries {list(query.shape)}")


def distances(length: int, device: torch.device) -> Tensor:
    """Position of each key less that of each query, int64 [length, length]."""
    positions = torch.arange(length, device=device)
    return positions.unsqueeze(0) - positions.unsqueeze(1)


def hidden_of(length: int, before: int | None, after: int | None, device: torch.device) -> Tensor:
    """Which keys each query does not see, bool [length, length]."""
    away = distances(length, device)
    hidden = torch.zeros_like(away, dtype=torch.bool)
    if before is not None:
        hidden |= away < -before
    if after is not None:
        hidden |= away > after
    return hidden


def bias_of(bias: Tensor, length: int) -> Tensor:
    """The bias of every pair of positions, float32 [heads, length, length]."""
    reach = bias.shape[1] // 2
    return bias[:, distances(length, bias.device).clamp(-reach, reach) + reach]
