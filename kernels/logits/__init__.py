"""Passes over whole rows of logits on the host's way to a token."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["argmax", "to_weights"]


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Best id (int64 [R]; the lowest of equals) and its value (float32 [R]) of each row of logits [R, V] of
    any floating type. A NaN anywhere in a row makes its value NaN."""
    ids, values = implementation("logits", logits.device.type).argmax(logits)
    return ids, values


def to_weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Turns float32 logits [N, W] into exp((logit - best) / temperature), in place, and returns them.

    best, temperature: float32 [N]; best is each row's maximum, so the largest weight is exactly 1, and -inf
    gives exactly 0. Temperature > 0.
    """
    weights: Tensor = implementation("logits", logits.device.type).to_weights(logits, best, temperature)
    return weights
