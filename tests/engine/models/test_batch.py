"""The flat tensors of a step, checked entry by entry, and the block table rows kept between steps."""

from __future__ import annotations

import pytest
import torch

from penstock.engine_service.core.batch import BatchBuilder, StepTensors
from penstock.engine_service.core.messages import AddRequest
from penstock.engine_service.core.request import Request, ScheduledSequence, Sequence, StepPlan

BLOCK_SIZE = 4


def sequence(tokens: list[int], blocks: list[int], computed: int = 0, slot: int = 0) -> Sequence:
    made = Request.create(AddRequest(1, tokens)).sequences[0]
    made.block_table, made.num_computed_tokens, made.slot = blocks, computed, slot
    return made


def build(builder: BatchBuilder, *work: tuple[Sequence, int]) -> StepTensors:
    return builder.build(StepPlan([ScheduledSequence(*item) for item in work]))


def builder() -> BatchBuilder:
    return BatchBuilder(BLOCK_SIZE, torch.device("cpu"))


def test_every_entry_of_a_mixed_step() -> None:
    decode = sequence([10, 11, 12, 13, 14, 15], [7, 2], computed=5, slot=1)
    chunk = sequence([20, 21, 22, 23, 24, 25, 26], [5, 9, 1], computed=3, slot=30)
    whole = sequence([30, 31], [0], slot=0)
    step = build(builder(), (decode, 1), (chunk, 3), (whole, 2))
    assert step.token_ids.tolist() == [15, 23, 24, 25, 30, 31]
    assert step.positions.tolist() == [5, 3, 4, 5, 0, 1]
    assert step.slots.tolist() == [2 * 4 + 1, 5 * 4 + 3, 9 * 4, 9 * 4 + 1, 0, 1]
    assert step.query_starts == [0, 1, 4]
    assert step.attention.query_lens == [1, 3, 2]
    assert step.attention.seq_lens == [6, 6, 2]
    assert step.attention.num_decodes == 1
    assert step.attention.block_tables[:, :2].tolist()[:2] == [[7, 2], [5, 9]]
    assert step.attention.block_tables[2, 0] == 0


def test_only_leading_single_tokens_count_as_decodes() -> None:
    one, chunk, other = (sequence([1, 2, 3], [i], slot=i) for i in range(3))
    assert build(builder(), (one, 1), (chunk, 2), (other, 1)).attention.num_decodes == 1


def test_a_sequence_with_nothing_to_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        build(builder(), (sequence([1], [0], computed=1), 0))


def first_slot(builder: BatchBuilder, owner: Sequence) -> int:
    return int(build(builder, (owner, 1)).slots[0])


def test_blocks_added_since_the_last_step_are_seen() -> None:
    tables, growing = builder(), sequence(list(range(200)), [3])
    assert first_slot(tables, growing) == 12
    growing.block_table.extend(range(4, 40))
    growing.num_computed_tokens = 130
    assert first_slot(tables, growing) == (4 + 31) * 4 + 2


def test_a_slots_next_owner_brings_its_own_blocks() -> None:
    """Whether or not the owner before was forgotten."""
    for forget in (True, False):
        tables, first, second = builder(), sequence([1], [3]), sequence([1], [6])
        assert first_slot(tables, first) == 12
        if forget:
            tables.forget(first)
        assert first_slot(tables, second) == 24
        assert first_slot(tables, first) == 12


def test_a_preempted_sequence_back_in_its_slot_brings_its_new_blocks() -> None:
    tables, back = builder(), sequence([1, 2, 3, 4, 5], [3, 4])
    assert first_slot(tables, back) == 12
    back.num_preemptions += 1
    back.block_table = [8, 9]
    assert first_slot(tables, back) == 32


def test_forgetting_a_sequence_does_not_touch_the_slots_new_owner() -> None:
    tables, first, second = builder(), sequence([1], [3]), sequence([1, 2], [6])
    first_slot(tables, first)
    first_slot(tables, second)
    tables.forget(first)
    second.num_computed_tokens = 1
    assert first_slot(tables, second) == 25
    first.slot = -1
    tables.forget(first)
