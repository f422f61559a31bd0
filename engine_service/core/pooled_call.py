"""One live pooled request: what of it is computed, and its answer. Knows no queue and no tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.engine_service.core.messages import (
    SIMILARITY,
    AddPooled,
    Finish,
    Pooled,
    RequestError,
    Started,
    Timings,
    Usage,
)
from penstock.engine_service.core.slots import Int32s

Rows = NDArray[np.float32]  # [rows, width] of one input


class PooledCall:
    """The longest inputs are computed first, so that those of a step are of about one length."""

    def __init__(self, params: AddPooled) -> None:
        """Raises RequestError for inputs that cannot be, whatever the model."""
        self.params = params
        self.token_ids: Int32s = np.asarray(params.prompt, np.int32)
        self.token_types: Int32s = np.asarray(params.token_type_ids, np.int32)
        self.lengths = np.asarray(params.lengths, np.int64)
        _check(self.token_ids, self.token_types, self.lengths)
        self.ends = np.cumsum(self.lengths)
        self.num_waiting_tokens = len(self.token_ids)
        self.first_scheduled_us = 0
        self.tag = 0  # tokens served when its turn comes, see PooledQueue
        self.over = False
        self._order = np.argsort(-self.lengths, kind="stable").tolist()
        self._next = 0
        self._rows: list[Rows | None] = [None] * len(self.lengths)
        self._num_computed = 0

    @property
    def id(self) -> int:
        return self.params.id

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.token_ids))

    @property
    def all_scheduled(self) -> bool:
        return self._next == len(self._order)

    @property
    def complete(self) -> bool:
        return self._num_computed == len(self._rows)

    @property
    def next_length(self) -> int:
        """Tokens of the input that is next."""
        return int(self.lengths[self._order[self._next]])

    def take(self) -> PooledInput:
        """The next input, for the step that is being made."""
        index = self._order[self._next]
        self._next += 1
        item = PooledInput(self, index)
        self.num_waiting_tokens -= item.length
        return item

    def add(self, index: int, rows: Rows) -> None:
        self._rows[index] = rows
        self._num_computed += 1

    def started(self) -> Started:
        queue_us = max(0, self.first_scheduled_us - self.params.arrival_us)
        return Started(self.id, self.usage, queue_us)

    def finish(self, reason: int, now_us: int, pooled: Pooled | None = None) -> Finish:
        scheduled = self.first_scheduled_us or now_us
        timings = Timings(max(0, scheduled - self.params.arrival_us), max(0, now_us - scheduled))
        return Finish(self.id, 0, reason, self.usage, timings, pooled=pooled)

    def answer(self) -> Pooled:
        """What was asked for, once all inputs are computed."""
        rows = [own for own in self._rows if own is not None]
        values, counts = np.concatenate(rows), [len(own) for own in rows]
        if self.params.kind == SIMILARITY:  # the vectors are of length 1
            # Clipped: rounding takes what is equal a little above 1.
            values = np.clip(values[1:] @ values[0], -1.0, 1.0)[:, None]
            counts = [0, *counts[1:]]
        return Pooled(np.ascontiguousarray(values, "<f4").tobytes(), values.shape[1], counts)


class PooledInput(NamedTuple):
    """Input `number` of a call."""

    call: PooledCall
    number: int

    @property
    def length(self) -> int:
        return int(self.call.lengths[self.number])

    @property
    def token_ids(self) -> Int32s:
        return self.call.token_ids[self._span]

    @property
    def token_types(self) -> Int32s:
        """Empty: all 0."""
        return self.call.token_types[self._span]

    @property
    def _span(self) -> slice:
        end = int(self.call.ends[self.number])
        return slice(end - self.length, end)


def _check(token_ids: Int32s, token_types: Int32s, lengths: NDArray[np.int64]) -> None:
    if not len(lengths) or lengths.min() < 1:
        raise RequestError("invalid_value", "An input has no tokens.", "inputs")
    if lengths.sum() != len(token_ids) or len(token_types) not in (0, len(token_ids)):
        raise RequestError("invalid_value", "The lengths of the inputs do not fit.", "inputs")
