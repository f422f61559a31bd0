"""Attention of new tokens over their sequences' paged keys and values."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation
from penstock.kernels.paged_attention.batch import AttentionBatch

__all__ = ["AttentionBatch", "paged_attention"]


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
    """softmax(soft_cap(query @ key * scale) + slopes * (key's position - query's)) @ value over a mixed batch
    of decodes and prefill chunks.

    query [tokens, heads, head_dim], strided; kv_cache [blocks, block_size, 2, kv_heads, head_dim], in query's
    dtype or float8_e4m3fn, with the new tokens' keys and values written; returns [tokens, heads, head_dim],
    contiguous, in query's dtype; what it holds in the rows of padding is not defined.
    A token sees itself and what came before it; with `window`, only the last `window` tokens, its own
    included. `soft_cap` bounds scores to (-c, c) by c * tanh(score / c). `slopes`, float32 [heads], are those
    of ALiBi (Press et al. 2021, arXiv:2108.12409). Query head h reads key/value head
    h // (heads // kv_heads). Slots outside the sequences' tokens may hold anything, NaN too.
    """
    module = implementation("paged_attention", query.device.type)
    return module.paged_attention(
        query, kv_cache, batch, scale=scale, window=window, soft_cap=soft_cap, slopes=slopes
    )
