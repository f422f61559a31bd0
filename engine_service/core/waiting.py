"""The queue of sequences that hold no slot, and the deadlines of requests. Knows no blocks and no steps."""

from __future__ import annotations

import heapq

from penstock.engine_service.core.messages import RequestError
from penstock.engine_service.core.request import Rank, Sequence

# Entries of members that left stay in a heap until they outnumber the live ones by this many.
_SLACK = 256


class WaitingQueue:
    """Sequences by rank. Adding and taking are O(log n), leaving from the middle amortised O(1)."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Sequence]] = []
        self._entries: dict[Sequence, int] = {}  # the live heap entry of each member
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._entries

    def push(self, sequence: Sequence) -> None:
        self._serial += 1
        self._entries[sequence] = self._serial
        heapq.heappush(self._heap, (sequence.rank, self._serial, sequence))

    def peek(self) -> Sequence | None:
        while self._heap:
            _, serial, sequence = self._heap[0]
            if self._entries.get(sequence) == serial:
                return sequence
            heapq.heappop(self._heap)
        return None

    def discard(self, sequence: Sequence) -> None:
        if self._entries.pop(sequence, None) is None:
            return
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = [entry for entry in self._heap if self._entries.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)


class Deadlines:
    """Which requests have run out of time. Times are monotonic microseconds. Holds ids only, so a request
    that is over is not kept in memory until its deadline."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, bool]] = []  # (time, request id, whether it is the queue's)
        self._live: set[int] = set()

    def add(self, request_id: int, deadline_us: int, queue_deadline_us: int) -> None:
        """0: none."""
        self._live.add(request_id)
        if deadline_us:
            heapq.heappush(self._heap, (deadline_us, request_id, False))
        if queue_deadline_us:
            heapq.heappush(self._heap, (queue_deadline_us, request_id, True))

    def discard(self, request_id: int) -> None:
        self._live.discard(request_id)
        if len(self._heap) > 2 * len(self._live) + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)

    @property
    def next_us(self) -> int | None:
        """The earliest deadline of a live request."""
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def passed(self, now_us: int) -> list[tuple[int, bool]]:
        """(request id, whether it was the queue's deadline) of live requests; each deadline is told once."""
        late = []
        while (at_us := self.next_us) is not None and at_us <= now_us:
            _, request_id, queue = heapq.heappop(self._heap)
            late.append((request_id, queue))
        return late


def too_late(queue: bool) -> RequestError:
    """The error of a request that ran out of time; queue: while it waited."""
    if queue:
        return RequestError("queue_timeout", "The request waited in the queue for too long.")
    return RequestError("timeout", "The deadline passed before the request was finished.")
