"""The flat tensors of a step, checked entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plans import plan_rows

from penstock.engine_service.core.batch import BatchBuilder, StepTensors
from penstock.engine_service.core.messages import AddRequest
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.slots import SlotTable

BLOCK_SIZE = 4


@pytest.fixture
def table() -> SlotTable:
    return SlotTable(32, 300, BLOCK_SIZE)


def put(table: SlotTable, tokens: list[int], blocks: list[int], computed: int = 0, slot: int = 0) -> Sequence:
    made = Request.create(AddRequest(1, tokens)).sequences[0]
    table.take(slot, made)
    table.append_blocks(slot, blocks)
    table.num_computed[slot] = computed
    return made


def build(
    table: SlotTable, *work: tuple[Sequence, int], drafts: dict[int, list[int]] | None = None
) -> StepTensors:
    return BatchBuilder(BLOCK_SIZE, torch.device("cpu")).build(plan_rows(table, list(work), drafts))


def test_every_entry_of_a_mixed_step(table: SlotTable) -> None:
    decode = put(table, [10, 11, 12, 13, 14, 15], [7, 2], computed=5, slot=1)
    chunk = put(table, [20, 21, 22, 23, 24, 25, 26], [5, 9, 1], computed=3, slot=30)
    whole = put(table, [30, 31], [0], slot=0)
    step = build(table, (decode, 1), (chunk, 3), (whole, 2))
    assert step.token_ids.tolist() == [15, 23, 24, 25, 30, 31]
    assert step.positions.tolist() == [5, 3, 4, 5, 0, 1]
    assert step.slots.tolist() == [2 * 4 + 1, 5 * 4 + 3, 9 * 4, 9 * 4 + 1, 0, 1]
    assert step.query_starts == [0, 1, 4]
    assert step.attention.query_lens == [1, 3, 2]
    assert step.attention.seq_lens == [6, 6, 2]
    assert step.attention.num_decodes == 1
    assert step.attention.block_tables[:, :2].tolist()[:2] == [[7, 2], [5, 9]]
    assert step.attention.block_tables[2, 0] == 0


def test_every_entry_of_a_step_of_decodes(table: SlotTable) -> None:
    first = put(table, list(range(10, 16)), [7, 2], computed=5, slot=3)
    second = put(table, list(range(50, 60)), [1, 8, 4], computed=8, slot=0)
    step = build(table, (first, 1), (second, 1))
    assert step.token_ids.tolist() == [15, 58]
    assert step.positions.tolist() == [5, 8]
    assert step.slots.tolist() == [2 * 4 + 1, 4 * 4]
    assert step.query_starts == [0, 1]
    assert (step.attention.num_decodes, step.attention.seq_lens) == (2, [6, 9])
    assert step.attention.block_tables[1].tolist() == [1, 8, 4]


def test_drafts_stand_behind_the_last_token(table: SlotTable) -> None:
    decode = put(table, [10, 11, 12], [7, 2], computed=2, slot=1)
    drafted = put(table, [20, 21], [5, 9], computed=1, slot=2)
    step = build(table, (decode, 1), (drafted, 4), drafts={1: [91, 92, 93]})
    assert step.token_ids.tolist() == [12, 21, 91, 92, 93]
    assert step.positions.tolist() == [2, 1, 2, 3, 4]
    assert step.slots.tolist() == [30, 21, 22, 23, 36]


def test_only_leading_single_tokens_count_as_decodes(table: SlotTable) -> None:
    one, chunk, other = (put(table, [1, 2, 3], [i], slot=i) for i in range(3))
    assert build(table, (one, 1), (chunk, 2), (other, 1)).attention.num_decodes == 1


def test_a_sequence_with_nothing_to_compute_is_refused(table: SlotTable) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        build(table, (put(table, [1], [0], computed=1), 0))


def test_blocks_added_since_the_last_step_are_seen(table: SlotTable) -> None:
    growing = put(table, list(range(200)), [3])
    assert int(build(table, (growing, 1)).slots[0]) == 12
    table.append_blocks(0, list(range(4, 40)))
    table.num_computed[0] = 130
    assert int(build(table, (growing, 1)).slots[0]) == (4 + 31) * 4 + 2


def test_a_slots_next_owner_brings_its_own_blocks(table: SlotTable) -> None:
    first = put(table, [1], [3])
    epoch = table.epochs[0]
    assert int(build(table, (first, 1)).slots[0]) == 12
    table.leave(first, keep_tokens=True)
    second = put(table, [5], [6])
    assert int(build(table, (second, 1)).slots[0]) == 24
    assert table.epochs[0] > epoch
    assert first.token_ids.tolist() == [1]
    assert np.array_equal(second.token_ids, [5])
