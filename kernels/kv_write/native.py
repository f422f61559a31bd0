"""Norm, rotation and cache write by the native library, into the tiles that its attention reads.

A cache of tiles is [blocks, kv_heads, block_size / 16, elements of a tile]; `native/src/layout.h` says what
lies where in a tile. A cache that it does not suit (fp8, fp16, other block sizes, odd heads) has the usual
layout and is the torch path's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import dispatch
from penstock.kernels.kv_write import cpu, reference
from penstock.kernels.native.library import (
    DTYPES,
    FLOAT,
    INT,
    INT64,
    POINTER,
    bind,
    check,
    threads_for,
)

TILE = 16  # tokens
MOST_DIMS = 256
TILED_DIMS = 4  # of a cache of tiles; the usual layout has 5

_rotate_and_write = bind(
    __name__, "_rotate_and_write", "rotate_and_write", *[POINTER] * 6, *[INT64] * 8, FLOAT, INT, INT
)


def cache_shape(
    blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[int, ...]:
    if not _suits(block_size, head_dim, dtype):
        return reference.cache_shape(blocks, block_size, kv_heads, head_dim, dtype)
    return blocks, kv_heads, block_size // TILE, tile_elements(head_dim)


def tile_elements(head_dim: int) -> int:
    """Keys, and values whose rows are padded to whole vectors."""
    return TILE * (head_dim + -(-head_dim // 16) * 16)


def _suits(block_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    if dtype not in DTYPES or block_size % TILE or head_dim % 2 or head_dim > MOST_DIMS:
        return False
    # Both ops or neither: nobody else can read tiles.
    return dispatch.implementation("paged_attention", "cpu").__name__.endswith(".native")


def rotate_and_write(
    heads: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    rotation: tuple[Tensor, Tensor] | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    if kv_cache.dim() != TILED_DIMS:
        cpu.rotate_and_write(heads, kv_cache, slots, rotation, norm_weight, eps)
        return
    tokens, num_heads, head_dim = heads.shape
    blocks, kv_heads, tiles, _ = kv_cache.shape
    if heads.dtype is not kv_cache.dtype or heads.stride(1) != head_dim or heads.stride(2) != 1:
        raise ValueError("heads must have the cache's dtype and lie one after the other")
    if slots.dtype is not torch.int64 or not slots.is_contiguous() or len(slots) != tokens:
        raise ValueError("slots must be int64, one for each token")
    cos, sin = (None, None) if rotation is None else rotation
    check(
        _rotate_and_write(
            heads.data_ptr(),
            kv_cache.data_ptr(),
            slots.data_ptr(),
            None if cos is None else cos.data_ptr(),
            None if sin is None else sin.data_ptr(),
            None if norm_weight is None else norm_weight.data_ptr(),
            tokens,
            heads.stride(0),
            num_heads - 2 * kv_heads,
            kv_heads,
            head_dim,
            0 if cos is None else cos.shape[1],
            blocks,
            tiles * TILE,
            eps,
            DTYPES[heads.dtype],
            threads_for(tokens * num_heads * head_dim),
        )
    )
