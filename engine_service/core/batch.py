"""Turns a step's plan into flat tensors: tokens, positions, slots, block tables. Knows no policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.core.request import Sequence, StepPlan
from penstock.kernels.paged_attention import AttentionBatch


@dataclass(slots=True)
class StepTensors:
    """T tokens of S sequences, one after the other in the plan's order."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, in the sequence
    slots: Tensor  # [T] int64, where each token's key and value go
    attention: AttentionBatch
    query_starts: list[int]  # [S], first row of each sequence


class BatchBuilder:
    """Builds the tensors of a step. Block tables stay in rows by `Sequence.slot` and only grow."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = np.zeros((8, 16), dtype=np.int64)
        self._owners: list[tuple[Sequence, int] | None] = [None] * 8  # (sequence, preemptions when copied)
        self._filled = [0] * 8

    def build(self, plan: StepPlan) -> StepTensors:
        """Raises ValueError for a sequence with nothing to compute: attention over no queries may trap."""
        items = plan.scheduled
        token_ids: list[int] = []
        starts = np.empty(len(items), dtype=np.int64)
        lengths = np.empty(len(items), dtype=np.int64)
        num_decodes = 0
        for i, item in enumerate(items):
            start, count, tokens = item.sequence.num_computed_tokens, item.num_tokens, item.sequence.token_ids
            starts[i], lengths[i] = start, count
            if count == 1:
                token_ids.append(tokens[start])
                num_decodes += num_decodes == i  # only the leading ones
            elif count < 1:
                raise ValueError("a scheduled sequence needs at least one token to compute")
            else:
                token_ids.extend(tokens[start : start + count])
        rows = [self._update_row(item.sequence) for item in items]
        ends = np.cumsum(lengths)
        query_starts = ends - lengths
        sequence_of = np.repeat(np.arange(len(items)), lengths)
        positions = np.arange(len(token_ids)) + (starts - query_starts)[sequence_of]
        seq_lens = starts + lengths
        size = self._block_size
        tables = self._tables[rows, : -(-int(seq_lens.max()) // size)]
        slots = tables[sequence_of, positions // size] * size + positions % size
        attention = AttentionBatch(
            query_lens=lengths.tolist(),
            seq_lens=seq_lens.tolist(),
            num_decodes=num_decodes,
            block_size=size,
            block_tables=self._place(tables),
        )
        ids = np.array(token_ids, dtype=np.int64)
        return StepTensors(
            self._place(ids), self._place(positions), self._place(slots), attention, query_starts.tolist()
        )

    def _place(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _update_row(self, sequence: Sequence) -> int:
        """Copies the blocks the sequence got since its last step, all of them when the row was another's."""
        slot, blocks = sequence.slot, sequence.block_table
        if slot >= len(self._owners) or len(blocks) > self._tables.shape[1]:
            self._grow(slot + 1, len(blocks))
        owner = self._owners[slot]
        if owner is None or owner[0] is not sequence or owner[1] != sequence.num_preemptions:
            self._owners[slot] = (sequence, sequence.num_preemptions)
            self._filled[slot] = 0
        filled = self._filled[slot]
        if filled < len(blocks):
            self._tables[slot, filled : len(blocks)] = blocks[filled:]
            self._filled[slot] = len(blocks)
        return slot

    def forget(self, sequence: Sequence) -> None:
        """Lets go of a sequence that will not run again."""
        slot = sequence.slot
        if 0 <= slot < len(self._owners):
            owner = self._owners[slot]
            if owner is not None and owner[0] is sequence:
                self._owners[slot] = None

    def _grow(self, num_rows: int, num_blocks: int) -> None:
        old = self._tables
        shape = (_double(old.shape[0], num_rows), _double(old.shape[1], num_blocks))
        self._tables = np.zeros(shape, dtype=np.int64)
        self._tables[: old.shape[0], : old.shape[1]] = old
        more = shape[0] - old.shape[0]
        self._owners.extend([None] * more)
        self._filled.extend([0] * more)


def _double(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
