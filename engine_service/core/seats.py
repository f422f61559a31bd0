"""Who holds which slot, with its blocks, and since when a slot given up is free again. Knows no queue.

A sequence that leaves while a step in flight still computes for it leaves its slot and blocks taken: they
are free when no step writes to them any more.
"""

from __future__ import annotations

from collections.abc import Callable

from penstock.engine_service.core.kv_cache import KvCache
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.running import RunningSet
from penstock.engine_service.core.slots import SlotTable


class Seats:
    """on_release(sequence) is called when a sequence loses its slot, while the slot number is still set."""

    def __init__(self, table: SlotTable, kv: KvCache, on_release: Callable[[Sequence], None]) -> None:
        self.running = RunningSet(table.num_slots)
        self._table = table
        self._kv = kv
        self._on_release = on_release
        self._free = list(range(table.num_slots - 1, -1, -1))
        self._retired: list[tuple[int, int, list[int]]] = []  # (serial of the last plan, slot, blocks)
        self._held: dict[int, int] = {}  # request id -> sequences holding a slot
        self.completed = 0  # serial of the last step that is no longer in flight

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def has_retired(self) -> bool:
        """Whether slots or blocks wait for a step in flight."""
        return bool(self._retired)

    @property
    def num_requests(self) -> int:
        """Requests of which a sequence holds a slot."""
        return len(self._held)

    def is_seated(self, request_id: int) -> bool:
        return request_id in self._held

    def take(self, sequence: Sequence) -> int:
        """A free slot, of which there must be one, for a sequence without any; it has no blocks yet."""
        slot = self._free.pop()
        self._table.take(slot, sequence)
        self.running.add(sequence)
        request_id = sequence.request.id
        self._held[request_id] = self._held.get(request_id, 0) + 1
        return slot

    def leave(self, sequence: Sequence, keep_tokens: bool) -> None:
        """Takes slot and blocks from a running sequence."""
        self._on_release(sequence)
        self.running.remove(sequence)
        slot = sequence.slot
        blocks = self._kv.release(sequence)
        self._table.leave(sequence, keep_tokens)
        last_plan = int(self._table.last_plan[slot])
        if last_plan > self.completed:
            self._retired.append((last_plan, slot, blocks))
            self._retired.sort(key=lambda entry: entry[0])
        else:
            self._give_back(slot, blocks)
        request_id = sequence.request.id
        self._held[request_id] -= 1
        if not self._held[request_id]:
            del self._held[request_id]

    def complete(self, serial: int) -> None:
        """Steps up to this one are no longer in flight."""
        self.completed = serial
        while self._retired and self._retired[0][0] <= serial:
            _, slot, blocks = self._retired.pop(0)
            self._give_back(slot, blocks)

    def _give_back(self, slot: int, blocks: list[int]) -> None:
        self._kv.pool.release(blocks)
        self._free.append(slot)
