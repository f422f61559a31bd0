"""Step inputs built by one launch, against plain torch, over buffers full of garbage."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from penstock.kernels.inputs import InputBuffers, layout, reference, triton

SLOTS, MAX_BLOCKS, BLOCK_SIZE = 9, 300, 4
GARBAGE = 123_456_789
PADDING_SLOT = 4000


def buffers(num_tokens: int, num_seqs: int, num_samples: int) -> InputBuffers:
    made = InputBuffers.create(
        num_slots=SLOTS,
        max_num_tokens=num_tokens + 3,
        max_num_seqs=num_seqs + 3,
        max_num_samples=num_samples + 3,
        max_blocks=MAX_BLOCKS,
        device=torch.device("cpu"),
    )
    for field in dataclasses.fields(made):
        getattr(made, field.name).fill_(GARBAGE)
    made.last_tokens.copy_(torch.arange(SLOTS) + 50_000)
    return made


def pack(sequences: list[list[int]], ids: list[int], new_blocks: list[int]) -> Tensor:
    header = [len(sequences), len(ids), 0, 0]
    flat = header + [word for fields in sequences for word in fields] + ids + new_blocks
    # What lies behind the step's numbers belongs to an earlier, longer step.
    return torch.tensor(flat + [GARBAGE] * 50, dtype=torch.int32)


class Steps:
    """Random steps as an engine would send them: tables grow, slots change hands."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.known = dict.fromkeys(range(SLOTS), 0)

    def next(self, lengths: list[tuple[int, int]]) -> tuple[Tensor, int]:
        """lengths: (start, count) of each sequence. Also the number of rows to sample."""
        dice = self.dice
        rows, ids, blocks, samples = [], [], [], 0
        for slot, (start, count) in zip(dice.sample(range(SLOTS), len(lengths)), lengths, strict=True):
            needed = -(-(start + count) // BLOCK_SIZE)
            known = self.known[slot] if dice.random() < 0.6 else 0
            total = max(known, needed + dice.choice([0, 0, 3]))
            fresh = [dice.randrange(900) for _ in range(total - known)]
            self.known[slot] = total
            pending = int(count == 1 and dice.random() < 0.5)
            sampled = dice.randint(0, min(count, 4))
            rows.append(
                [slot, start, count, pending, len(ids), samples, sampled, known, len(fresh), len(blocks)]
            )
            assert len(rows[-1]) == layout.SEQUENCE_FIELDS
            ids += [dice.randrange(150_000) for _ in range(count)]
            blocks += fresh
            samples += sampled
        return pack(rows, ids, blocks), samples


def on(buffers: InputBuffers, device: torch.device) -> InputBuffers:
    return InputBuffers(
        **{
            field.name: getattr(buffers, field.name).to(device, copy=True)
            for field in dataclasses.fields(buffers)
        }
    )


SHAPES = {
    "decodes": ([(0, 1), (5, 1), (7, 1), (8, 1), (601, 1)], 5, 5),
    "padded decodes": ([(3, 1), (4, 1), (1100, 1)], 8, 8),
    "one": ([(17, 1)], 1, 1),
    "prefill": ([(0, 300)], 300, 1),
    "mixed": ([(9, 1), (16, 1), (130, 129), (0, 7), (1, 128)], 400, 9),
    "padding only": ([], 2, 2),
    "much padding": ([(3, 2)], 390, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_plain_torch_and_writes_nothing_else(shape: str, device: torch.device) -> None:
    lengths, num_tokens, num_seqs = SHAPES[shape]
    steps = Steps(3)
    expected = buffers(num_tokens, num_seqs, 20)
    actual = on(expected, device)
    for _ in range(3):
        packed, num_samples = steps.next(lengths)
        reference.build_inputs(packed, expected, num_tokens, num_seqs, BLOCK_SIZE, PADDING_SLOT)
        on_device = packed.to(device)
        triton.build_inputs(on_device, actual, num_tokens, num_seqs, BLOCK_SIZE, PADDING_SLOT)
        assert torch.equal(on_device.cpu(), packed)
        for field in dataclasses.fields(expected):
            wanted, got = getattr(expected, field.name), getattr(actual, field.name)
            assert torch.equal(got.cpu(), wanted), field.name
        sampled = torch.arange(num_samples, dtype=torch.int32) * 7 - 1
        reference.keep_tokens(packed, sampled, expected.last_tokens, num_seqs)
        triton.keep_tokens(on_device, sampled.to(device), actual.last_tokens, num_seqs)
        assert torch.equal(actual.last_tokens.cpu(), expected.last_tokens)


def test_the_oracle_by_hand() -> None:
    """Two sequences, one of them pending, in a bucket for more: every number written out."""
    made = buffers(6, 4, 4)
    first = [2, 5, 1, 1, 0, 0, 1, 1, 1, 0]  # slot 2, position 5, knows one block, gets 77
    second = [7, 2, 3, 0, 1, 1, 2, 0, 2, 1]  # slot 7, positions 2 to 4, gets 40 and 41, two rows to sample
    made.block_tables[2, 0] = 11
    packed = pack([first, second], [GARBAGE, 100, 101, 102], [77, 40, 41])
    reference.build_inputs(packed, made, 6, 4, BLOCK_SIZE, PADDING_SLOT)
    assert made.token_ids[:6].tolist() == [50_002, 100, 101, 102, 0, 0]
    assert made.positions[:6].tolist() == [5, 2, 3, 4, 0, 0]
    assert made.kv_slots[:6].tolist() == [77 * 4 + 1, 40 * 4 + 2, 40 * 4 + 3, 41 * 4, 4000, 4001]
    assert made.query_starts[:5].tolist() == [0, 1, 4, 4, 4]
    assert made.context_lens[:4].tolist() == [6, 5, 0, 0]
    assert made.step_tables[0, :2].tolist() == [11, 77]
    assert made.step_tables[1, :2].tolist() == [40, 41]
    assert made.block_tables[2, :3].tolist() == [11, 77, GARBAGE]
    assert made.sample_rows[:4].tolist() == [0, 2, 3, GARBAGE]
    before = made.last_tokens.tolist()
    reference.keep_tokens(packed, torch.tensor([-1, 8, 9]), made.last_tokens, 4)
    assert made.last_tokens.tolist() == [0 if i == 2 else 9 if i == 7 else before[i] for i in range(SLOTS)]


def test_rows_that_are_no_tables_are_refused() -> None:
    made = buffers(2, 2, 2)
    wrong = dataclasses.replace(made, step_tables=made.step_tables.T)
    with pytest.raises(ValueError, match="contiguous"):
        triton.build_inputs(pack([], [], []), wrong, 2, 2, BLOCK_SIZE, PADDING_SLOT)


def test_buffers_need_room() -> None:
    with pytest.raises(ValueError, match="a row"):
        InputBuffers.create(
            num_slots=1, max_num_tokens=0, max_num_seqs=1, max_num_samples=1, max_blocks=1,
            device=torch.device("cpu"),
        )  # fmt: skip
