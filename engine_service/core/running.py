"""The sequences that hold a slot, in the order of their rank. Knows no policy.

The order is kept in a list and in an array beside it; both change only when a sequence comes or goes.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

import numpy as np

from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.slots import Int64s

_rank = attrgetter("rank")


class RunningSet:
    def __init__(self, num_slots: int) -> None:
        self.sequences: list[Sequence] = []
        self._slots: Int64s = np.empty(num_slots, np.int64)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def slots(self) -> Int64s:
        """[n], by rank; a view that the next change shifts."""
        return self._slots[: len(self.sequences)]

    @property
    def last(self) -> Sequence:
        """The lowest in rank: the first to give way."""
        return self.sequences[-1]

    def add(self, sequence: Sequence) -> None:
        place, count = bisect_left(self.sequences, sequence.rank, key=_rank), len(self.sequences)
        self.sequences.insert(place, sequence)
        self._slots[place + 1 : count + 1] = self._slots[place:count]
        self._slots[place] = sequence.slot

    def remove(self, sequence: Sequence) -> None:
        place, count = bisect_left(self.sequences, sequence.rank, key=_rank), len(self.sequences)
        del self.sequences[place]
        self._slots[place : count - 1] = self._slots[place + 1 : count]
