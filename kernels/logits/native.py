"""Passes over logits by the native library; argmax on the logits' own type, without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.logits import reference
from penstock.kernels.native.library import (
    DTYPES,
    INT,
    INT64,
    POINTER,
    bind,
    threads_for,
)

_argmax = bind(__name__, "_argmax", "argmax", *[POINTER] * 3, *[INT64] * 3, INT, INT)
_to_weights = bind(__name__, "_to_weights", "to_weights", *[POINTER] * 3, *[INT64] * 3, INT)


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


def to_weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    rows, width = logits.shape
    floats = all(tensor.dtype is torch.float32 for tensor in (logits, best, temperature))
    if not floats or not (logits.is_contiguous() and best.is_contiguous() and temperature.is_contiguous()):
        return reference.to_weights(logits, best, temperature)
    _to_weights(
        logits.data_ptr(), best.data_ptr(), temperature.data_ptr(), rows, width, width,
        threads_for(logits.numel()),
    )  # fmt: skip
    return logits
