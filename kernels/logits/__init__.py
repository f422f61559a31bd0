"""Passes over whole rows of logits on the host's way to a token."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["apply_bitmask", "argmax", "masked_argmax", "to_weights"]


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


def apply_bitmask(logits: Tensor, words: Tensor, rows: Tensor) -> None:
    """Sets, in place, logits[rows[n], i] to -inf where bit i % 32 of words[n, i // 32] is 0, for the columns
    that the words cover. logits float32 [R, W]; words int32 [N, M], 32 M <= W; rows int64 [N], distinct."""
    implementation("logits", logits.device.type).apply_bitmask(logits, words, rows)


def masked_argmax(logits: Tensor, words: Tensor) -> tuple[int, float]:
    """Best id (the lowest of equals) and its value of logits [V], of any floating type and without NaN, among
    those whose bit in words int32 [ceil(V / 32)] is 1. The value is -inf where these have none above it."""
    found: tuple[int, float] = implementation("logits", logits.device.type).masked_argmax(logits, words)
    return found
