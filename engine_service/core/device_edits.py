"""Makes requests' changes to the logits on a copy of their rows on the device. Knows edits, no sequences.

Everything the host contributes is added to one upload first; the launches come after it is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine_service.core.logit_edits import LogitEdits, Mask
from penstock.engine_service.core.upload import Upload
from penstock.kernels import sampling


@dataclass(slots=True, frozen=True)
class RowEdits:
    """What changes in one row: `edits` (its `allowed` is not looked at), then `mask`, if any."""

    row: int
    edits: LogitEdits | None
    mask: Mask | None


def mask_of(ids: NDArray[np.int64], vocab_size: int) -> Mask:
    """The mask that allows these ids alone."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    allowed[ids] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)


class DeviceEdits:
    """The edits of a step's rows: `source` [num_rows] of `work` [E, V], as the draw kernels take them."""

    def __init__(self, rows: list[RowEdits], num_rows: int, upload: Upload) -> None:
        self._upload = upload
        self._rows = upload.add(np.array([row.row for row in rows]))
        source = np.full(num_rows, -1)
        source[[row.row for row in rows]] = np.arange(len(rows))
        self._source = upload.add(source)
        edits = [(place, row.edits) for place, row in enumerate(rows) if row.edits is not None]
        self._penalties = self._add_penalties(edits)
        self._bias = self._add_pairs([(place, edit.bias_ids) for place, edit in edits])
        self._bias_values = -1
        if self._bias is not None:
            self._bias_values = upload.add(np.concatenate([edit.bias for _, edit in edits]))
        masks = [(place, row.mask) for place, row in enumerate(rows) if row.mask is not None]
        self._masks: tuple[int, int] | None = None
        if masks:
            words = np.stack([mask for _, mask in masks])
            self._masks = (upload.add(words), upload.add(np.array([place for place, _ in masks])))
        self._banned = self._add_pairs([(place, edit.banned) for place, edit in edits])

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The edited copy of the rows and `source`. Launches only; logits [R, V] stay as they are."""
        tensor = self._upload.tensor
        work = logits.index_select(0, tensor(self._rows)).to(torch.float32)
        kernels = sampling.edits(logits.device)
        if self._penalties is not None:
            kernels.apply_penalties(work, *(tensor(part) for part in self._penalties))
        if self._bias is not None:
            kernels.add_bias(work, *(tensor(part) for part in self._bias), tensor(self._bias_values))
        if self._masks is not None:
            words, places = self._masks
            sampling.apply_bitmask(work, tensor(words), tensor(places))
        if self._banned is not None:
            kernels.ban(work, *(tensor(part) for part in self._banned))
        return work, tensor(self._source)

    def _add_pairs(self, ids: list[tuple[int, NDArray[np.int64]]]) -> tuple[int, int] | None:
        sizes = [len(part) for _, part in ids]
        if not sum(sizes):
            return None
        places = np.repeat([place for place, _ in ids], sizes)
        return self._upload.add(places), self._upload.add(np.concatenate([part for _, part in ids]))

    def _add_penalties(self, edits: list[tuple[int, LogitEdits]]) -> tuple[int, ...] | None:
        rows = [(place, edit.penalties) for place, edit in edits if edit.penalties is not None]
        pairs = self._add_pairs([(place, penalties.counts.ids) for place, penalties in rows])
        if pairs is None:
            return None
        sizes = [len(penalties.counts.ids) for _, penalties in rows]
        costs = (
            np.concatenate([penalties.counts.output_counts for _, penalties in rows]),
            np.repeat([penalties.repetition for _, penalties in rows], sizes),
            np.repeat([penalties.presence for _, penalties in rows], sizes),
            np.repeat([penalties.frequency for _, penalties in rows], sizes),
        )
        return (*pairs, *(self._upload.add(np.asarray(part, np.float32)) for part in costs))
