"""Cache write in plain torch."""

from __future__ import annotations

from torch import Tensor


def kv_write(key_value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    kv_cache.flatten(0, 1).index_copy_(0, slots, key_value)
