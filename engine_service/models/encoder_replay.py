"""An encoder's layers as one call of the native library, over buffers that stay: no Python between the ops,
no pages of fresh memory, and one team of threads for all of them. Knows no layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.engine_service.models.pooled import VarlenBatch
from penstock.kernels.native.program import APART_FROM, SAME_SET_BYTES, NotRecordable, Program, Rows

# Replaces the hidden states [tokens, hidden] of inputs that begin and end at int32 [inputs + 1].
Record = Callable[[Program, Tensor, Tensor], None]

log = logging.getLogger("penstock.engine.replay")

# With more tokens the products take all of the time, and the buffers a lot of memory.
MOST_TOKENS = 2048
_FIRST_CAPACITY = 64


class EncoderReplay:
    """Made with the first batch, and again when one has more tokens than any before."""

    def __init__(self, record: Record, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
        """record: raises NotRecordable for an encoder that no program can hold."""
        self._record: Record | None = record
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._recorded: _Recorded | None = None
        alike = any(size * dtype.itemsize % SAME_SET_BYTES == 0 for size in (hidden_size, intermediate_size))
        # Many such rows are copied before each product instead.
        self._most_tokens = APART_FROM - 1 if alike else MOST_TOKENS

    @property
    def capacity(self) -> int:
        """Tokens there are buffers for; 0: none."""
        return 0 if self._recorded is None else self._recorded.program.capacity.tokens

    def __call__(self, x: Tensor, batch: VarlenBatch) -> Tensor | None:
        """What the layers make of x [tokens, hidden], or None where that has to be computed the ordinary
        way. The same bits as that gives."""
        tokens = len(x)
        if self._record is None or tokens > self._most_tokens or x.dtype is not self._dtype:
            return None
        if self.capacity < tokens:
            self._recorded = self._made(self._record, tokens)
        return None if self._recorded is None else self._recorded.run(x, batch)

    def _made(self, record: Record, tokens: int) -> _Recorded | None:
        capacity = _FIRST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        self._recorded = None  # its buffers go first
        try:
            return _Recorded(record, capacity, self._hidden_size, self._dtype)
        except NotRecordable as reason:
            log.debug("the encoder is not replayed: %s", reason)
            self._record = None
            return None


class _Recorded:
    def __init__(self, record: Record, capacity: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.program = Program(Rows(capacity, capacity, 0), dtype)
        self._hidden = self.program.buffer("hidden", hidden_size)
        self._starts = torch.zeros(capacity + 1, dtype=torch.int32)
        record(self.program, self._hidden, self._starts)

    def run(self, x: Tensor, batch: VarlenBatch) -> Tensor:
        tokens, inputs = len(x), len(batch.lengths)
        self._hidden[:tokens] = x
        self._starts[: inputs + 1] = batch.starts
        self.program.run(Rows(tokens, inputs, 0))
        return self._hidden[:tokens].clone()
