"""Steps as one call of the native library: the model's ops are written down once, over buffers that stay, and
made again for each step with that step's inputs. Knows which steps and models that suits.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.core.batch import BatchBuilder, StepBuffers
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.sampler import Best, SampleRows
from penstock.engine_service.core.slots import Int64s
from penstock.engine_service.core.verify import sample_rows
from penstock.kernels.native.program import SAMPLES, SEQUENCES, NotRecordable, Program, Rows

log = logging.getLogger("penstock.engine.replay")

# Of sequences, and of samples: with more the products take all of the time, and logits a lot of memory.
MOST_ROWS = 64
# A prompt's chunk of the default size; the buffers of so many tokens must not take more than that either.
MOST_TOKENS = 2048
_MOST_BYTES = 128 << 20
_FIRST_ROWS, _FIRST_TOKENS = 8, 256


@runtime_checkable
class Recordable(Protocol):
    """A model that can write its step down."""

    def record(self, program: Program, inputs: StepBuffers, kv_caches: list[Tensor]) -> Tensor:
        """The buffer of the logits of the sampled tokens. Raises NotRecordable."""


class Replayed(NamedTuple):
    """The rows that a step samples, their logits [R, vocab_size], good until the next step, and the best of
    each."""

    rows: SampleRows
    logits: Tensor
    best: Best


class Replay:
    """The program of one model over its KV cache; made with the first step that suits, and again when a step
    has more rows than any before."""

    def __init__(self, model: object, kv_caches: list[Tensor], block_size: int) -> None:
        self._model = model if isinstance(model, Recordable) and kv_caches else None
        self._kv_caches = kv_caches
        self._block_size = block_size
        self._batches = BatchBuilder(block_size, torch.device("cpu"))
        self._recorded: _Recorded | None = None
        self._most_tokens = MOST_TOKENS

    def run(self, plan: StepPlan) -> Replayed | None:
        """Computes the step; None where that has to be done the ordinary way. The same bits as that gives."""
        if self._model is None or not _suits(plan):
            return None
        samples = len(plan) + sum(map(len, plan.drafts.values()))
        wanted = Rows(plan.num_tokens, len(plan), samples)
        if wanted.tokens > self._most_tokens or max(wanted[1:]) > MOST_ROWS:
            return None
        recorded = self._recorded
        if recorded is None or not recorded.has_room(wanted, plan.table.max_blocks):
            recorded = self._record(wanted, plan.table.max_blocks)
            if recorded is None:
                return None
        inputs = recorded.inputs
        if plan.num_decodes == len(plan) and plan.samples.all():
            rows = inputs.fill_decodes(plan, self._block_size)
        else:
            rows = inputs.fill(plan, self._batches)
        count = len(rows.sequences)
        recorded.program.run(Rows(wanted.tokens, wanted.sequences, count))
        ids, values = recorded.best
        return Replayed(rows, recorded.logits[:count], Best(ids[:count], values[:count]))

    def _record(self, wanted: Rows, max_blocks: int) -> _Recorded | None:
        if self._recorded is None:
            probe = self._make(Rows(1, 1, 1), 1)
            if probe is None:
                return None
            fitting = _MOST_BYTES // probe.program.token_bytes
            self._most_tokens = max(MOST_ROWS, min(MOST_TOKENS, fitting))
            if wanted.tokens > self._most_tokens:
                return None
        rows = _FIRST_ROWS if self._recorded is None else self._recorded.program.capacity.sequences
        tokens = rows if self._recorded is None else self._recorded.program.capacity.tokens
        while rows < max(wanted[1:]):
            rows *= 2
        if tokens < wanted.tokens:
            tokens = _FIRST_TOKENS if wanted.tokens > MOST_ROWS else rows
        while tokens < wanted.tokens:
            tokens *= 2
        self._recorded = None  # its buffers go first
        self._recorded = self._make(Rows(min(tokens, self._most_tokens), rows, rows), max_blocks)
        return self._recorded

    def _make(self, capacity: Rows, max_blocks: int) -> _Recorded | None:
        if self._model is None:
            return None
        try:
            program = Program(capacity, self._kv_caches[0].dtype)
            inputs = _Inputs(program, max_blocks)
            logits = self._model.record(program, inputs.buffers, self._kv_caches)
            ids, values = program.argmax(logits)
        except NotRecordable as reason:
            log.debug("steps are not replayed: %s", reason)
            self._model = None
            return None
        return _Recorded(program, inputs, logits, Best(ids.numpy()[:, 0], values.numpy()[:, 0]))


def _suits(plan: StepPlan) -> bool:
    """Not where blocks are to be copied first, nor where a prompt's tokens are to be scored."""
    behind = plan.sequences[plan.num_decodes :]
    return not len(plan.copies) and all(sequence.sampling.prompt_logprobs is None for sequence in behind)


class _Inputs:
    """The program's first buffers, and numpy's view of them."""

    def __init__(self, program: Program, max_blocks: int) -> None:
        def column(name: str, rows: int) -> Tensor:
            return program.buffer(name, 1, torch.int64, rows)

        self.buffers = StepBuffers(
            program.buffer("token ids", 1, torch.int64),
            program.buffer("positions", 1, torch.int64),
            program.buffer("slots", 1, torch.int64),
            column("query lens", SEQUENCES),
            column("seq lens", SEQUENCES),
            program.buffer("block tables", max_blocks, torch.int64, SEQUENCES),
            column("samples", SAMPLES),
            column("sample lens", SEQUENCES),
        )
        self._rows = np.arange(program.capacity.sequences)
        self._token_ids: Int64s = self.buffers.token_ids.numpy()[:, 0]
        self._positions: Int64s = self.buffers.positions.numpy()[:, 0]
        self._slots: Int64s = self.buffers.slots.numpy()[:, 0]
        self._query_lens: Int64s = self.buffers.query_lens.numpy()[:, 0]
        self._seq_lens: Int64s = self.buffers.seq_lens.numpy()[:, 0]
        self._tables: Int64s = self.buffers.block_tables.numpy()
        self._samples: Int64s = self.buffers.samples.numpy()[:, 0]
        self._sample_lens: Int64s = self.buffers.sample_lens.numpy()[:, 0]

    @property
    def max_blocks(self) -> int:
        return self._tables.shape[1]

    def fill_decodes(self, plan: StepPlan, block_size: int) -> SampleRows:
        """A token a sequence, all of them sampled."""
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
        self._query_lens[:rows] = self._sample_lens[:rows] = 1
        self._samples[:rows] = self._rows[:rows]
        return SampleRows(plan.sequences, plan.slots, plan.epochs)

    def fill(self, plan: StepPlan, batches: BatchBuilder) -> SampleRows:
        step, rows = batches.build(plan), len(plan)
        sampled, places = sample_rows(plan, step.query_starts)
        tokens = len(step.token_ids)
        self._token_ids[:tokens] = step.token_ids.numpy()
        self._positions[:tokens] = step.positions.numpy()
        self._slots[:tokens] = step.slots.numpy()
        self._query_lens[:rows] = step.attention.query_lens
        self._seq_lens[:rows] = step.attention.seq_lens
        tables = step.attention.block_tables.numpy()
        self._tables[:rows, : tables.shape[1]] = tables
        self._samples[: len(places)] = places
        self._sample_lens[:rows] = plan.samples
        for row, draft in plan.drafts.items():
            self._sample_lens[row] += len(draft)
        return sampled


class _Recorded(NamedTuple):
    program: Program
    inputs: _Inputs
    logits: Tensor
    best: Best  # of all the samples there is room for

    def has_room(self, wanted: Rows, max_blocks: int) -> bool:
        fits = all(rows <= most for rows, most in zip(wanted, self.program.capacity, strict=True))
        return fits and max_blocks <= self.inputs.max_blocks
