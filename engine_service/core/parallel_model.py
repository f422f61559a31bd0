"""A model that several ranks compute together: rank 0's side, and what a follower does with a step of it.

Rank 0 drives it as any other model. Each call first tells the followers what they need to make the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.core.batch import StepTensors, copy_first
from penstock.engine_service.core.parallel import FORWARD, LOGITS, IntArray, RankGroup, leave_now
from penstock.engine_service.models.registry import Model
from penstock.kernels.paged_attention import AttentionBatch

log = logging.getLogger("penstock.engine.ranks")

_HEADER = 6


class Executor(Protocol):
    """Does a follower's share of what rank 0 has broadcast."""

    def execute(self, array: IntArray) -> None:
        """array: a kind, then what that kind needs. An exception ends the rank, and the engine with it."""


class ParallelModel:
    """Rank 0's model. An exception once the others have begun leaves them waiting, so it ends the process."""

    def __init__(self, model: Model, group: RankGroup) -> None:
        self.group = group
        self._model = model

    def forward(self, step: StepTensors, kv_caches: list[Tensor]) -> Tensor:
        array = pack_step(step)
        with _in_step():
            self.group.broadcast_array(array)
            return self._model.forward(step, kv_caches)

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        with _in_step():
            self.group.broadcast_array(np.array([LOGITS, *hidden.shape], dtype=np.int32))
            self.group.broadcast_tensor(hidden)
            return self._model.logits(hidden)


class EagerExecutor:
    """A follower's model, called as rank 0 calls its own."""

    def __init__(
        self,
        model: Model,
        kv_caches: list[Tensor],
        group: RankGroup,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._group = group
        self._block_size = block_size
        self._dtype = dtype
        self._device = device

    @torch.inference_mode()
    def execute(self, array: IntArray) -> None:
        """Raises ValueError for a kind that is not its own."""
        kind = int(array[0])
        if kind == FORWARD:
            step = unpack_step(array, self._block_size, self._device)
            copy_first(step, self._kv_caches)
            self._model.forward(step, self._kv_caches)
        elif kind == LOGITS:
            hidden = torch.empty(array[1:3].tolist(), dtype=self._dtype, device=self._device)
            self._group.broadcast_tensor(hidden)
            self._model.logits(hidden)
        else:
            raise ValueError(f"rank 0 sent an unknown kind {kind}")


def pack_step(step: StepTensors) -> IntArray:
    """FORWARD, counts, then token ids, positions, cache slots, query lengths, sequence lengths, block copies,
    block tables. Reads the step back from the device."""
    query_lens, seq_lens = step.attention.on_host()
    tables = step.attention.block_tables
    copies = [] if step.copies is None else [_values(step.copies)]
    counts = [len(step.token_ids), len(seq_lens), step.attention.num_decodes, tables.shape[1]]
    header = [FORWARD, *counts, sum(map(len, copies))]
    parts = [np.array([*header], dtype=np.int32)]
    parts += [_values(tensor) for tensor in (step.token_ids, step.positions, step.slots)]
    parts += [np.array(lengths, dtype=np.int32) for lengths in (query_lens, seq_lens)]
    return np.concatenate([*parts, *copies, _values(tables)])


def unpack_step(array: IntArray, block_size: int, device: torch.device) -> StepTensors:
    num_tokens, num_sequences, num_decodes, max_blocks, num_copied = array[1:_HEADER].tolist()
    sizes = [num_tokens] * 3 + [num_sequences] * 2 + [num_copied]
    *flat, query_lens, seq_lens, copied, tables = np.split(array, np.cumsum([_HEADER, *sizes]))[1:]
    token_ids, positions, slots = (torch.from_numpy(part).to(device, torch.int64) for part in flat)
    starts = np.cumsum(query_lens) - query_lens
    attention = AttentionBatch(
        query_lens=query_lens.tolist(),
        seq_lens=seq_lens.tolist(),
        num_decodes=num_decodes,
        block_size=block_size,
        block_tables=torch.from_numpy(tables).to(device, torch.int64).view(num_sequences, max_blocks),
    )
    copies = torch.from_numpy(copied).to(device, torch.int64).view(-1, 2) if num_copied else None
    return StepTensors(token_ids, positions, slots, attention, starts.tolist(), copies)


def _values(tensor: Tensor) -> IntArray:
    return tensor.flatten().to("cpu", torch.int32).numpy()


@contextmanager
def _in_step() -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception("a step of several ranks failed")
        leave_now("the ranks are out of step")
