"""Decode steps as one call of the native library: the model's ops are written down once, over buffers that
stay, and made again for each step with that step's inputs. Knows which steps and models that suits.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.core.batch import StepBuffers
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.sampler import Best
from penstock.engine_service.core.slots import Int64s
from penstock.kernels.native.program import NotRecordable, Program

log = logging.getLogger("penstock.engine.replay")

# With more rows the products take all of the time, and logits a lot of memory.
MOST_ROWS = 64
_FIRST_CAPACITY = 8


@runtime_checkable
class Recordable(Protocol):
    """A model that can write its decode step down."""

    def record(self, program: Program, inputs: StepBuffers, kv_caches: list[Tensor]) -> Tensor:
        """The buffer of the logits. Raises NotRecordable."""


class Replay:
    """The program of one model over its KV cache; made with the first step that suits, and again when a step
    has more rows than any before."""

    def __init__(self, model: object, kv_caches: list[Tensor], block_size: int) -> None:
        self._model = model if isinstance(model, Recordable) and kv_caches else None
        self._kv_caches = kv_caches
        self._block_size = block_size
        self._recorded: _Recorded | None = None

    def logits(self, plan: StepPlan) -> tuple[Tensor, Best] | None:
        """Logits [S, vocab_size] of the plan's rows, good until the next call, and the best of each; None
        where the step has to be computed the ordinary way. The same bits as that gives."""
        rows = len(plan)
        if self._model is None or rows > MOST_ROWS or not _suits(plan):
            return None
        recorded = self._recorded
        if recorded is None or not recorded.has_room(plan):
            recorded = self._record(plan)
            if recorded is None:
                return None
        recorded.inputs.fill(plan, self._block_size)
        recorded.program.run(rows)
        ids, values = recorded.best
        return recorded.logits[:rows], Best(ids[:rows], values[:rows])

    def _record(self, plan: StepPlan) -> _Recorded | None:
        if self._model is None:
            return None
        capacity = _FIRST_CAPACITY if self._recorded is None else self._recorded.program.capacity
        while capacity < len(plan):
            capacity *= 2
        self._recorded = None  # its buffers go first
        try:
            program = Program(capacity, self._kv_caches[0].dtype)
            inputs = _Inputs(program, plan.table.max_blocks)
            logits = self._model.record(program, inputs.buffers, self._kv_caches)
            ids, values = program.argmax(logits)
            self._recorded = _Recorded(program, inputs, logits, Best(ids.numpy()[:, 0], values.numpy()[:, 0]))
        except NotRecordable as reason:
            log.debug("decode steps are not replayed: %s", reason)
            self._model = None
        return self._recorded


def _suits(plan: StepPlan) -> bool:
    return plan.num_decodes == len(plan) and not len(plan.copies) and bool(plan.samples.all())


class _Inputs:
    """The program's first buffers, and numpy's view of them."""

    def __init__(self, program: Program, max_blocks: int) -> None:
        def column(name: str) -> Tensor:
            return program.buffer(name, 1, torch.int64)

        self.buffers = StepBuffers(
            column("token ids"),
            column("positions"),
            column("slots"),
            column("query lens").fill_(1),
            column("seq lens"),
            program.buffer("block tables", max_blocks, torch.int64),
        )
        self._rows = np.arange(program.capacity)
        self._token_ids: Int64s = self.buffers.token_ids.numpy()[:, 0]
        self._positions: Int64s = self.buffers.positions.numpy()[:, 0]
        self._slots: Int64s = self.buffers.slots.numpy()[:, 0]
        self._seq_lens: Int64s = self.buffers.seq_lens.numpy()[:, 0]
        self._tables: Int64s = self.buffers.block_tables.numpy()

    @property
    def max_blocks(self) -> int:
        return self._tables.shape[1]

    def fill(self, plan: StepPlan, block_size: int) -> None:
        table, rows = plan.table, len(plan)
        positions = plan.starts
        blocks = int(positions.max()) // block_size + 1
        tables = self._tables[:rows]
        tables[:, :blocks] = table.block_tables[plan.slots, :blocks]
        self._token_ids[:rows] = table.tokens[plan.slots, positions]
        self._positions[:rows] = positions
        own = tables[self._rows[:rows], positions // block_size]
        self._slots[:rows] = own * block_size + positions % block_size
        self._seq_lens[:rows] = positions
        self._seq_lens[:rows] += 1


class _Recorded(NamedTuple):
    program: Program
    inputs: _Inputs
    logits: Tensor
    best: Best  # of all the rows there is room for

    def has_room(self, plan: StepPlan) -> bool:
        return len(plan) <= self.program.capacity and plan.table.max_blocks <= self.inputs.max_blocks
