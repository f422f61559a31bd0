"""Passes over logits in plain torch."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.sampling.reference import argmax as _argmax
from penstock.kernels.sampling.reference import to_weights

__all__ = ["argmax", "to_weights"]


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, values = _argmax(logits)
    return ids, values.float()
