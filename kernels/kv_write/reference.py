"""Norm, rotation and cache write in plain torch, computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.rope.reference import rope


def cache_shape(
    blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[int, ...]:
    return blocks, block_size, 2, kv_heads, head_dim


def rotate_and_write(
    heads: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    rotation: tuple[Tensor, Tensor] | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    kv_heads = kv_cache.shape[3]
    query_key = heads[:, : heads.shape[1] - kv_heads]
    wide = query_key.float()
    if norm_weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * norm_weight.float()
    if rotation is not None:
        rope(wide, *rotation)
    query_key.copy_(wide)
    key_value = heads[:, -2 * kv_heads :].unflatten(1, (2, kv_heads))
    kept = slots >= 0
    write(key_value[kept], kv_cache, slots[kept])


def write(key_value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """key_value [tokens, 2, kv_heads, head_dim] into slots that are all >= 0."""
    rows = kv_cache.flatten(0, 1)
    if kv_cache.dtype == torch.float8_e4m3fn:
        largest = torch.finfo(kv_cache.dtype).max
        narrow = key_value.float().clamp(-largest, largest).to(kv_cache.dtype)
        rows.view(torch.uint8).index_copy_(0, slots, narrow.view(torch.uint8))
    else:
        rows.index_copy_(0, slots, key_value.to(kv_cache.dtype))
