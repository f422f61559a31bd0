"""Sequences that begin as copies of others: beams. Who gives way for them is the scheduler's business.

Full blocks are shared, since nobody writes to them again. A partial one is copied before the next step, into
the fork's own: no block is ever written to by two.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from penstock.engine_service.core.block_pool import BlockPool
from penstock.engine_service.core.kv_cache import KvCache
from penstock.engine_service.core.messages import AddRequest, RequestError
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.seats import Seats
from penstock.engine_service.core.slots import Int64s, SlotTable


class Forks:
    def __init__(self, table: SlotTable, kv: KvCache, seats: Seats) -> None:
        self._table = table
        self._kv = kv
        self._seats = seats
        self._copies: dict[Sequence, tuple[int, int]] = {}  # (from, to), until the next plan

    def seat(self, sequence: Sequence, parent: Sequence, num_shared: int) -> bool:
        """Gives a sequence without a slot one, and blocks that begin with what `parent` has computed of its
        first num_shared tokens. False, and nothing changes, when there is no slot or too few blocks."""
        if not self._seats.num_free:
            return False
        blocks = self._kv.fork(parent, num_shared, sequence.num_tokens)
        if blocks is None:
            return False
        slot = self._seats.take(sequence)
        self._kv.seat_fork(sequence, parent, blocks, num_shared)
        self._table.exact[slot] = True
        shared, fresh = blocks
        if num_shared % self._table.block_size:
            self._copies[sequence] = parent.block_table[len(shared)], fresh[0]
        if not sequence.first_scheduled_us:
            sequence.first_scheduled_us = parent.first_scheduled_us
            sequence.first_token_us = parent.first_token_us
        return True

    def forget(self, sequence: Sequence) -> None:
        """The sequence loses its slot: its block needs no content any more."""
        self._copies.pop(sequence, None)

    def take_copies(self) -> tuple[list[Sequence], Int64s]:
        """What the next step must copy before anything else: for whom, and [n, 2] from and to."""
        copied, pairs = list(self._copies), list(self._copies.values())
        self._copies.clear()
        return copied, np.array(pairs, np.int64).reshape(-1, 2)


def checked_beam(params: AddRequest, num_slots: int, max_model_len: int) -> AddRequest:
    """The request as this scheduler can search for it. Raises RequestError for more beams than slots."""
    if params.beam is None:
        return params
    if not params.n <= params.beam.width <= num_slots:
        raise RequestError(
            "invalid_value", f"This engine searches with {params.n} to {num_slots} beams.", "best_of"
        )
    room = max_model_len - len(params.prompt)
    return replace(params, max_new_tokens=min(params.max_new_tokens, room))


def beam_headroom(sequence: Sequence, pool: BlockPool) -> int:
    """Free blocks that the other beams of a waiting request will take; nobody starts just to give way."""
    return (slots_for(sequence) - 1) * (1 + pool.blocks_for(sequence.num_output_tokens))


def slots_for(sequence: Sequence) -> int:
    """Slots that will be taken when the waiting sequence starts."""
    search = sequence.request.search
    return 1 if search is None else search.width


def too_wide() -> RequestError:
    return RequestError(
        "invalid_value", "The engine's KV cache cannot hold that many beams of this length.", "best_of"
    )
