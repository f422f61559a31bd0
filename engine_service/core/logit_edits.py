"""What requests change in the logits before a token is chosen: penalties, bias, allowed and banned ids.

Knows rows of logits and token ids, no sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine_service.core.penalties import TokenCounts
from penstock.kernels import sampling

Ids = NDArray[np.int64]
Mask = NDArray[np.int32]  # a bit per token, bit i % 32 of word i // 32; 0 forbids it


@dataclass(slots=True, frozen=True)
class Penalties:
    """A sequence's counts and what they cost; repetition 1, presence 0 and frequency 0 cost nothing."""

    counts: TokenCounts
    repetition: float
    presence: float
    frequency: float


@dataclass(slots=True, frozen=True)
class LogitEdits:
    """The changes to one row this step, in the order they are made. Ids lie in the vocabulary."""

    penalties: Penalties | None
    bias_ids: Ids  # distinct
    bias: NDArray[np.float32]
    allowed: Ids  # empty: all
    banned: Ids


def apply_edits(logits: Tensor, edits: Sequence[tuple[int, LogitEdits]]) -> None:
    """Makes the changes in place; `edits` holds (row, changes), each row of logits [N, W] at most once."""
    _penalise(logits, [(row, edit.penalties) for row, edit in edits if edit.penalties is not None])
    biased, ids = _elements(edits, lambda edit: edit.bias_ids)
    if ids.size:
        bias = np.concatenate([edit.bias for _, edit in edits])
        sampling.add_bias(logits, *_on(logits.device, biased, ids, bias))
    limited, ids = _elements(edits, lambda edit: edit.allowed)
    if ids.size:
        sampling.allow_only(logits, *_on(logits.device, limited, ids))
    banned, ids = _elements(edits, lambda edit: edit.banned)
    if ids.size:
        sampling.ban(logits, *_on(logits.device, banned, ids))


def _penalise(logits: Tensor, penalties: list[tuple[int, Penalties]]) -> None:
    if not penalties:
        return
    sizes = [len(penalty.counts.ids) for _, penalty in penalties]
    ids = np.concatenate([penalty.counts.ids for _, penalty in penalties])
    output_counts = np.concatenate([penalty.counts.output_counts for _, penalty in penalties])

    def repeated(values: list[float]) -> NDArray[np.float32]:
        return np.repeat(np.array(values, np.float32), sizes)

    sampling.apply_penalties(
        logits,
        *_on(
            logits.device,
            np.repeat(np.array([row for row, _ in penalties], np.int64), sizes),
            ids,
            output_counts,
            repeated([penalty.repetition for _, penalty in penalties]),
            repeated([penalty.presence for _, penalty in penalties]),
            repeated([penalty.frequency for _, penalty in penalties]),
        ),
    )


def _elements(
    edits: Sequence[tuple[int, LogitEdits]], ids_of: Callable[[LogitEdits], Ids]
) -> tuple[Ids, Ids]:
    """Row and id of every element that one kind of change touches."""
    ids = [ids_of(edit) for _, edit in edits]
    rows = np.repeat(np.array([row for row, _ in edits], np.int64), [len(part) for part in ids])
    return rows, np.concatenate(ids)


def _on(device: torch.device, *arrays: NDArray[np.generic]) -> list[Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]
