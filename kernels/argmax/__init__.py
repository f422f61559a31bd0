"""The best token of each row of logits."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["argmax"]


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Best id (int64 [R]; the lowest of equals) and its value (float32 [R]) of each row of logits [R, V] of
    any floating type. A NaN anywhere in a row makes its value NaN."""
    ids, values = implementation("argmax", logits.device.type).argmax(logits)
    return ids, values
