"""Argmax by the native library, straight on the logits' own type."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.argmax import reference
from penstock.kernels.native.library import (
    DTYPES,
    INT,
    INT64,
    POINTER,
    bind,
    threads_for,
)

_argmax = bind(__name__, "_argmax", "argmax", *[POINTER] * 3, *[INT64] * 3, INT, INT)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    kind = DTYPES.get(logits.dtype)
    rows, size = logits.shape
    if kind is None or logits.stride(1) != 1 or not size:
        return reference.argmax(logits)
    ids = torch.empty(rows, dtype=torch.int64)
    values = torch.empty(rows, dtype=torch.float32)
    _argmax(
        logits.data_ptr(), ids.data_ptr(), values.data_ptr(), rows, size, logits.stride(0), kind,
        threads_for(logits.numel()),
    )  # fmt: skip
    return ids, values
