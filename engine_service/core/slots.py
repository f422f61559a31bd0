"""Per-sequence state in arrays by slot: token ids, counts, block tables. Knows no policy and no tensors.

A slot is a row in [0, num_slots), held by one sequence at a time. The ranges of a row's tokens:

    |<---------------- num_prompt ---------------->|<-- output -->|
    |<------- num_computed ------->|<- next step ->|              |
    0                                                             num_tokens <= num_expected

Keys and values of [0, num_computed) exist, or are being computed by a step in flight. num_expected also
counts the token that a step in flight is about to sample: its position is known, its id not yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from penstock.engine_service.core.request import Sequence

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Stop ids of a sequence beyond these are looked up in Python.
MAX_STOP_IDS = 8
NO_ID = -1


class SlotTable:
    """All arrays are [num_slots] or [num_slots, ...]; only the scheduler's thread writes to them.

    tokens: int32 [num_slots, max_model_len + 1]; a row's ids from num_tokens on have no meaning.
    block_tables: int32 [num_slots, max_blocks]; entries from num_blocks on are valid block numbers of no
    meaning. In one tenancy (see epochs) num_blocks only grows and the entries before it never change, so that
    a copy elsewhere needs the new entries alone. Large rows are memory only once they are written.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int) -> None:
        self.num_slots = num_slots
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.max_blocks = -(-max_model_len // block_size)
        self.tokens: Int32s = np.empty((num_slots, max_model_len + 1), np.int32)
        self.block_tables: Int32s = np.zeros((num_slots, self.max_blocks), np.int32)
        self.num_prompt = _zeros(num_slots)
        self.num_tokens = _zeros(num_slots)
        self.num_expected = _zeros(num_slots)
        self.num_computed = _zeros(num_slots)
        self.num_blocks = _zeros(num_slots)
        # Tokens at which the choice ends by length, prompt included.
        self.limits = _zeros(num_slots)
        # Goes up with every change of owner: a row planned for an earlier tenancy is no longer its slot's.
        self.epochs: Int64s = np.zeros(num_slots, np.int64)
        # Transposed, so that the few that are in use are contiguous: [MAX_STOP_IDS, num_slots].
        self.stop_ids: Int32s = np.full((MAX_STOP_IDS, num_slots), NO_ID, np.int32)
        self.stop_width = 0  # rows of stop_ids that any sequence has used
        self.request_ids: Int64s = np.zeros(num_slots, np.int64)
        self.choices = _zeros(num_slots)
        # Needs its last token on the host before the next can be planned.
        self.exact: Bools = np.zeros(num_slots, np.bool_)
        # May be given drafts.
        self.draftable: Bools = np.zeros(num_slots, np.bool_)
        # Its results need Python: its prompt is not done, or it wants log-probabilities.
        self.special: Bools = np.ones(num_slots, np.bool_)
        # Other choices of its request run or may run too.
        self.shared: Bools = np.zeros(num_slots, np.bool_)
        # The number of the last plan that has a row for the slot.
        self.last_plan: Int64s = np.zeros(num_slots, np.int64)
        self.owners: list[Sequence | None] = [None] * num_slots

    def take(self, slot: int, sequence: Sequence) -> None:
        """Puts a sequence without a slot into a free one; it has no blocks and has computed nothing."""
        tokens = sequence.token_ids
        count = len(tokens)
        params = sequence.request.params
        self.tokens[slot, :count] = tokens
        self.num_prompt[slot] = sequence.num_prompt_tokens
        self.num_tokens[slot] = self.num_expected[slot] = count
        self.num_computed[slot] = self.num_blocks[slot] = 0
        room = max(1, params.max_new_tokens)
        self.limits[slot] = min(sequence.num_prompt_tokens + room, self.max_model_len)
        self._set_stop_ids(slot, sequence)
        self.request_ids[slot] = params.id
        self.choices[slot] = sequence.choice
        self.exact[slot] = self.draftable[slot] = False
        self.special[slot] = True
        self.shared[slot] = len(sequence.request.sequences) > 1
        self.epochs[slot] += 1
        self.owners[slot] = sequence
        sequence.table, sequence.slot = self, slot

    def leave(self, sequence: Sequence, keep_tokens: bool) -> None:
        """The sequence goes on without the slot; it has computed nothing from here on."""
        slot = sequence.slot
        count = int(self.num_tokens[slot])
        sequence.keep(self.tokens[slot, :count].copy() if keep_tokens else None, count)
        self.epochs[slot] += 1
        self.owners[slot] = None
        self.num_computed[slot] = self.num_blocks[slot] = 0
        sequence.table, sequence.slot = None, -1

    def append_blocks(self, slot: int, blocks: list[int]) -> None:
        start = int(self.num_blocks[slot])
        self.block_tables[slot, start : start + len(blocks)] = blocks
        self.num_blocks[slot] = start + len(blocks)

    def blocks(self, slot: int) -> list[int]:
        return self.block_tables[slot, : self.num_blocks[slot]].tolist()

    def _set_stop_ids(self, slot: int, sequence: Sequence) -> None:
        ids = sequence.request.stop_ids
        self.stop_ids[:, slot] = NO_ID
        count = min(len(ids), MAX_STOP_IDS)
        self.stop_ids[:count, slot] = ids[:count]
        self.stop_width = max(self.stop_width, count)


def _zeros(count: int) -> Int32s:
    return np.zeros(count, np.int32)
