"""Writing keys and values of new tokens into the paged cache."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["kv_write"]


def kv_write(key_value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """kv_cache[slot // block_size, slot % block_size] = key_value, for each token.

    key_value [tokens, 2, kv_heads, head_dim], keys first, strided; kv_cache [blocks, block_size, 2, kv_heads,
    head_dim], contiguous; slots [tokens] int64, each at most once, in [0, blocks * block_size).
    """
    implementation("kv_write", kv_cache.device.type).kv_write(key_value, kv_cache, slots)
