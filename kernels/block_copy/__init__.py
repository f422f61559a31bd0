"""Copies of whole blocks of the paged cache, for sequences that go on from a block others still read."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["copy_blocks"]


def copy_blocks(kv_cache: Tensor, sources: Tensor, targets: Tensor) -> None:
    """kv_cache[targets[i]] = kv_cache[sources[i]] for all i at once, as if everything were read first.

    kv_cache [blocks, ...] of any dtype; sources, targets [n] int64 on its device; targets are distinct, and
    none of them is a source.
    """
    implementation("block_copy", kv_cache.device.type).copy_blocks(kv_cache, sources, targets)
