"""Block copies in plain torch, which is one gather and one scatter on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_blocks(kv_cache: Tensor, sources: Tensor, targets: Tensor) -> None:
    # Bytes are bytes: there is no indexing of 8-bit floats.
    cache = kv_cache.view(torch.uint8) if kv_cache.dtype.itemsize == 1 else kv_cache
    cache.index_copy_(0, targets, cache.index_select(0, sources))
