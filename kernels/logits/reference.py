"""Passes over logits in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.sampling.reference import argmax as _argmax
from penstock.kernels.sampling.reference import to_weights

__all__ = ["argmax", "copy_masked", "masked_argmax", "to_weights"]

_BITS = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
# What a byte of a mask adds to eight logits. A table, because masks have no pattern that a branch could be
# predicted by: `masked_fill` takes up to ten times as long.
_ADDED_BY_BYTE = torch.where(_BITS == 1, 0.0, -torch.inf)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, values = _argmax(logits)
    return ids, values.float()


def masked_argmax(logits: Tensor, rows: Tensor, words: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    room = torch.empty(len(rows), logits.shape[1], device=logits.device)
    return copy_masked(logits, rows, words, masks, room)


def copy_masked(
    logits: Tensor, rows: Tensor, words: Tensor, masks: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    size = logits.shape[1]
    out[:, size:] = -torch.inf
    for place, (row, mask) in enumerate(zip(rows.tolist(), masks.tolist(), strict=True)):
        out[place, :size].copy_(logits[row])
        if mask >= 0:
            out[place, :size] += _added_by(words[mask])[:size]
    return argmax(out[:, :size])


def _added_by(words: Tensor) -> Tensor:
    """0 or -inf for each bit: float32 [32 * M]."""
    table = _ADDED_BY_BYTE.to(words.device)
    return table[words.contiguous().view(torch.uint8).long()].flatten()
