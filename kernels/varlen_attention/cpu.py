"""Varlen attention for the CPU: torch's blocked attention, inputs of one length in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.varlen_attention.reference import bias_of, check, hidden_of


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
    shared = query.shape[1] != key.shape[1]
    start = 0
    for length, count in _runs(lengths):
        end = start + length * count
        # [inputs, heads, length, head_dim]
        q, k, v = (x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
        mask = _mask(length, before, after, bias, query)
        done = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=shared)
        out[start:end] = done.transpose(1, 2).flatten(0, 1)
        start = end
    return out


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(length, how many inputs of it follow each other)."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


def _mask(
    length: int, before: int | None, after: int | None, bias: Tensor | None, query: Tensor
) -> Tensor | None:
    """Additive [heads or 1, length, length] in the query's dtype; None where everything is seen as it is."""
    narrow = any(reach is not None and reach < length - 1 for reach in (before, after))
    if bias is None and not narrow:
        return None
    mask = torch.zeros((1, length, length), device=query.device) if bias is None else bias_of(bias, length)
    if narrow:
        mask = mask.masked_fill(hidden_of(length, before, after, query.device), float("-inf"))
    return mask.to(query.dtype)
