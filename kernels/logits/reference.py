"""Passes over logits in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.sampling.reference import argmax as _argmax
from penstock.kernels.sampling.reference import to_weights

__all__ = ["apply_bitmask", "argmax", "masked_argmax", "to_weights"]

_BITS = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
# What a byte of a mask adds to eight logits. A table, because masks have no pattern that a branch could be
# predicted by: `masked_fill` takes up to ten times as long.
_ADDED_BY_BYTE = torch.where(_BITS == 1, 0.0, -torch.inf)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, values = _argmax(logits)
    return ids, values.float()


def apply_bitmask(logits: Tensor, words: Tensor, rows: Tensor) -> None:
    for row, own in zip(rows.tolist(), words, strict=True):
        added = _added_by(own)
        logits[row, : len(added)] += added


def masked_argmax(logits: Tensor, words: Tensor) -> tuple[int, float]:
    ids, values = argmax((logits.float() + _added_by(words)[: len(logits)]).unsqueeze(0))
    return int(ids), float(values)


def _added_by(words: Tensor) -> Tensor:
    """0 or -inf for each bit: float32 [32 * M]."""
    table = _ADDED_BY_BYTE.to(words.device)
    return table[words.contiguous().view(torch.uint8).long()].flatten()
