"""Passes over whole rows of logits on the host's way to a token."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["argmax", "copy_masked", "masked_argmax", "to_weights"]


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


def masked_argmax(logits: Tensor, rows: Tensor, words: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Best id (int64 [N], the lowest of equals) and its value (float32 [N]) of the rows logits[rows[n]] of
    logits [R, V], of any floating type and without NaN, among those whose bit in words[masks[n]] is 1; among
    all where masks[n] < 0. rows, masks: int64 [N]; words: int32 [M, at least ceil(V / 32)], bit i % 32 of
    word i // 32. The value is -inf where a row has none above it."""
    found: tuple[Tensor, Tensor] = implementation("logits", logits.device.type).masked_argmax(
        logits, rows, words, masks
    )
    return found


def copy_masked(
    logits: Tensor, rows: Tensor, words: Tensor, masks: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """As `masked_argmax`, and besides out[n] becomes the row, with -inf where its mask has a 0 and from
    column V on. out: float32 [N, at least V]."""
    found: tuple[Tensor, Tensor] = implementation("logits", logits.device.type).copy_masked(
        logits, rows, words, masks, out
    )
    return found
