"""Choosing tokens from logits.

The host's sampler works on padded copies and uniform numbers; its functions are plain torch, whatever the
device, but for those of `logits`. The device's sampler draws with noise made on the device and never needs
the host; its functions are chosen by device: `apply_bitmask`, `draw_tokens`, `filter_bounds`, `row_logprobs`,
and `edits` for the rest.

In the latter, rows of logits [R, V] (any float dtype, innermost stride 1) may be replaced by edited ones:
row r is work[source[r]] (float32 [E, V]) where the int32 source[r] is >= 0. slots int32 [R] say where a row's
numbers are in the table `parameters` (see the module of that name); a negative one marks a padding row.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from penstock.kernels.dispatch import implementation
from penstock.kernels.logits import argmax, copy_masked, masked_argmax, to_weights
from penstock.kernels.sampling.reference import (
    add_bias,
    allow_only,
    apply_penalties,
    ban,
    best_of,
    draw,
    draw_filtered,
    keep_filtered,
    padded_width,
    token_logprobs,
)

__all__ = [
    "add_bias",
    "allow_only",
    "apply_bitmask",
    "apply_penalties",
    "argmax",
    "ban",
    "best_of",
    "copy_masked",
    "draw",
    "draw_filtered",
    "draw_tokens",
    "edits",
    "filter_bounds",
    "keep_filtered",
    "masked_argmax",
    "padded_width",
    "row_logprobs",
    "to_weights",
    "token_logprobs",
]


def edits(device: torch.device) -> ModuleType:
    """The module whose add_bias, apply_penalties and ban suit tensors of this device; ids and rows int32."""
    return implementation("sampling", device.type)


def filter_bounds(
    logits: Tensor,
    slots: Tensor,
    parameters: Tensor,
    work: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """Where min-p, then top-k, then top-p cut each row: int32 [R, 2], an order key and an id.

    Tokens with a greater key stay, and those of this key up to this id, so that equal ones stay in the order
    of their ids. Rows that are not filtered, and those whose best logit is not finite, keep everything.
    """
    return implementation("sampling", logits.device.type).filter_bounds(
        logits, slots, parameters, work, source
    )


def draw_tokens(
    logits: Tensor,
    ids: Tensor,
    best: Tensor,
    *,
    slots: Tensor | None = None,
    positions: Tensor | None = None,
    parameters: Tensor | None = None,
    bounds: Tensor | None = None,
    work: Tensor | None = None,
    source: Tensor | None = None,
) -> None:
    """Writes a token for each row to ids int [R], and its best logit to `best` float32 [R].

    Greedy rows, all without `parameters`, get the lowest id of the best logits; others are drawn with the
    noise of their stream at positions int32 [R], from what `bounds` leave. best is NaN where a logit is NaN,
    and -inf where all are; the ids of such rows lie in the vocabulary, no more. Padding rows get 0 and 0.
    """
    implementation("sampling", logits.device.type).draw_tokens(
        logits,
        ids,
        best,
        slots=slots,
        positions=positions,
        parameters=parameters,
        bounds=bounds,
        work=work,
        source=source,
    )


def row_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability float32 [N] and rank int32 [N] (1 + the number of greater logits) of tokens[n] in raw
    logits[rows[n]], and the log of that row's sum of exponentials, float32 [N]. rows, tokens: int [N]."""
    return implementation("sampling", logits.device.type).row_logprobs(logits, rows, tokens)


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """Sets, in place, logits[rows[n], i] to -inf where bit i % 32 of bitmask[n, i // 32] is 0.

    logits [R, V]; bitmask int32 [N, at least ceil(V / 32)]; rows int [N], distinct.
    """
    implementation("sampling", logits.device.type).apply_bitmask(logits, bitmask, rows)
