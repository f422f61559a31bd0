"""Readying the heads of new tokens for attention, and their keys and values into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["cache_shape", "rotate_and_write"]


def cache_shape(
    blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, ...]:
    """The shape of a cache in the layout that the device's implementation reads best: [blocks, block_size, 2,
    kv_heads, head_dim], or another one with the blocks first, which only that implementation knows. Then a
    later `choose` of another one does not reach it. The cache must begin as zeros."""
    module = implementation("kv_write", device.type)
    shape: tuple[int, ...] = module.cache_shape(blocks, block_size, kv_heads, head_dim, dtype)
    return shape


def rotate_and_write(
    heads: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    rotation: tuple[Tensor, Tensor] | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """RMS norm and rotation of query and key heads, in place; then keys and values into the cache.

    heads [tokens, H + 2 * kv_heads, head_dim], strided: query heads, key heads, value heads; kv_cache of
    `cache_shape`, or [blocks, block_size, 2, kv_heads, head_dim], contiguous, of any floating type:
    float8_e4m3fn takes what lies beyond +-448 as +-448. slots [tokens] int64, each at most once: a token goes
    to kv_cache[slot // block_size, slot % block_size], and one with slot < 0 is padding, not written (its
    heads may still change).

    norm_weight [H + kv_heads, head_dim] or None for no norm, `eps` its own. rotation (cos, sin), both
    [tokens, rotary_dim] in heads' dtype with rotary_dim even and <= head_dim, or None: x * cos +
    swap_halves(x) * sin over the first rotary_dim elements. Both hold each angle twice, once a half, and the
    first half of `sin` is negated. (Su et al. 2021, arXiv:2104.09864, the halves of a head as the pairs.)
    """
    module = implementation("kv_write", kv_cache.device.type)
    module.rotate_and_write(heads, kv_cache, slots, rotation, norm_weight, eps)
