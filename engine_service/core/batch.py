"""Turns a step's plan into flat tensors: tokens, positions, slots, block tables. Knows no policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.slots import Int64s
from penstock.kernels.block_copy import copy_blocks
from penstock.kernels.paged_attention import AttentionBatch


@dataclass(slots=True)
class StepTensors:
    """T tokens of S sequences, one after the other in the plan's order."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, in the sequence
    slots: Tensor  # [T] int64, where each token's key and value go
    attention: AttentionBatch
    query_starts: list[int]  # [S], first row of each sequence
    copies: Tensor | None = None  # [C, 2] int64: before anything else, block [i, 0] to block [i, 1]


@dataclass(slots=True)
class StepBuffers:
    """Inputs of a step of up to T tokens of S sequences of which R are sampled, in buffers that stay: int64,
    contiguous. A sequence's samples are its last tokens."""

    token_ids: Tensor  # [T, 1]
    positions: Tensor  # [T, 1]
    slots: Tensor  # [T, 1]
    query_lens: Tensor  # [S, 1]
    seq_lens: Tensor  # [S, 1]
    block_tables: Tensor  # [S, max_blocks]
    samples: Tensor  # [R, 1], their places among the tokens
    sample_lens: Tensor  # [S, 1], how many of a sequence


def copy_first(step: StepTensors, kv_caches: list[Tensor]) -> None:
    """Makes the step's block copies, in the cache of each layer."""
    if step.copies is not None:
        sources, targets = step.copies.unbind(1)
        for kv_cache in kv_caches:
            copy_blocks(kv_cache, sources, targets)


class BatchBuilder:
    """Builds the tensors of a step whose input tokens are all known."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device

    def build(self, plan: StepPlan) -> StepTensors:
        """Raises ValueError for a sequence with nothing to compute: attention over no queries may trap."""
        table, size = plan.table, self._block_size
        lengths = plan.counts.astype(np.int64)
        if lengths.min() < 1:
            raise ValueError("a scheduled sequence needs at least one token to compute")
        starts = plan.starts.astype(np.int64)
        seq_lens = starts + lengths
        ends = np.cumsum(lengths)
        query_starts = ends - lengths
        longest = int(seq_lens.max())
        tables = table.block_tables[plan.slots, : -(-longest // size)].astype(np.int64)
        if plan.num_decodes == len(plan):
            positions = starts
            token_ids = table.tokens[plan.slots, starts].astype(np.int64)
            blocks = tables[query_starts, positions // size]
        else:
            row_of = np.repeat(np.arange(len(lengths)), lengths)
            positions = np.arange(len(row_of)) + (starts - query_starts)[row_of]
            token_ids = table.tokens[plan.slots[row_of], positions].astype(np.int64)
            for row, draft in plan.drafts.items():
                token_ids[ends[row] - len(draft) : ends[row]] = draft
            blocks = tables[row_of, positions // size]
        attention = AttentionBatch(
            query_lens=lengths.tolist(),
            seq_lens=seq_lens.tolist(),
            num_decodes=plan.num_decodes,
            block_size=size,
            block_tables=self._place(tables),
        )
        slots = blocks * size + positions % size
        return StepTensors(
            self._place(token_ids),
            self._place(positions),
            self._place(slots),
            attention,
            query_starts.tolist(),
            self._place(plan.copies) if len(plan.copies) else None,
        )

    def _place(self, array: Int64s | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
