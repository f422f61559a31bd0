"""Norm, rotation and cache write for the CPU: the fast ops one after the other, in the heads' own dtype."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.kv_write.reference import cache_shape, write
from penstock.kernels.norm import rms_norm
from penstock.kernels.rope import rope

__all__ = ["cache_shape", "rotate_and_write"]


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
    if norm_weight is not None:
        query_key.copy_(rms_norm(query_key, norm_weight, eps))
    if rotation is not None:
        rope(query_key, *rotation)
    key_value = heads[:, heads.shape[1] - 2 * kv_heads :].unflatten(1, (2, kv_heads))
    try:
        write(key_value, kv_cache, slots)
    except IndexError:  # padding, which the CPU's batches have not: not worth a look at every step's slots
        kept = slots >= 0
        write(key_value[kept], kv_cache, slots[kept])
