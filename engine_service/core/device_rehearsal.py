"""Steps as large as any that will come, over no request's blocks: for measuring memory, and so that whatever
a first step makes is made before serving. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from penstock.engine_service.core.device_step import StepLimits
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.plan import Runner, StepPlan
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.slots import Int32s, SlotTable

# One of each kind of sampling; the sequences of a step take them in turn.
_SAMPLING = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.7, top_p=0.9, top_k=20),
    Sampling(temperature=1.0, logprobs=5),
    Sampling(temperature=0.0, presence_penalty=0.5, repetition_penalty=1.1, logit_bias={0: 1.0}),
    Sampling(temperature=1.0, min_p=0.1),
)
_FIRST_ID = -(1 << 40)  # no request's


def rehearse(runner: Runner, limits: StepLimits) -> None:
    """Runs the largest steps there are, prompts and then decodes, and a small one of each kind.

    All of them share the block for padding, where anything may stand, so that what they compute means
    nothing, and a row may end in an error. Raises whatever a step as a whole raises.
    """
    seqs, tokens = limits.max_num_seqs, limits.max_num_tokens
    for num_seqs, num_tokens in ((seqs, tokens), (1, tokens), (min(2, seqs), min(5, tokens))):
        _rehearse(runner, limits, num_seqs, num_tokens)


def _rehearse(runner: Runner, limits: StepLimits, num_seqs: int, num_tokens: int) -> None:
    table = SlotTable(limits.num_slots, limits.max_model_len, limits.block_size)
    lengths = _lengths(num_seqs, num_tokens, max(1, limits.max_model_len - 1))
    sequences = [_sequence(i, length) for i, length in enumerate(lengths)]
    for slot, sequence in enumerate(sequences):
        table.take(slot, sequence)
        room = min(len(sequence.request.prompt) + 1, limits.max_model_len)
        table.append_blocks(slot, [limits.num_blocks] * -(-room // limits.block_size))
    try:
        for counts in _steps(lengths, limits.max_model_len):
            plan = _plan(table, sequences, counts)
            result = runner.start(plan).wait()
            slots = plan.slots
            table.num_computed[slots] += counts
            table.tokens[slots, table.num_tokens[slots]] = np.maximum(result.tokens[:, 0], 0)
            table.num_tokens[slots] += 1
    finally:
        for sequence in sequences:
            runner.forget(sequence)


def _lengths(num_seqs: int, num_tokens: int, longest: int) -> list[int]:
    """Prompt lengths that add up to num_tokens, or what `longest` allows; rising."""
    lengths, left = [], num_tokens
    for place in range(num_seqs, 0, -1):
        lengths.append(min(left // place, longest))
        left -= lengths[-1]
    return sorted(lengths)


def _steps(lengths: list[int], max_model_len: int) -> Iterator[Int32s]:
    counts = np.array(lengths, np.int32)
    yield counts
    if lengths[-1] < max_model_len:
        yield np.ones_like(counts)


def _sequence(number: int, length: int) -> Sequence:
    sampling = _SAMPLING[number % len(_SAMPLING)]
    if length > 2 and number == 0:
        sampling = Sampling(temperature=0.0, prompt_logprobs=2)
    params = AddRequest(_FIRST_ID - number, [0] * length, sampling, max_new_tokens=2)
    return Request.create(params).sequences[0]


def _plan(table: SlotTable, sequences: list[Sequence], counts: Int32s) -> StepPlan:
    slots = np.array([sequence.slot for sequence in sequences], np.int64)
    behind = np.flatnonzero(counts > 1)
    return StepPlan(
        table=table,
        sequences=sequences,
        slots=slots,
        starts=table.num_computed[slots],
        counts=counts,
        samples=np.ones(len(slots), np.bool_),
        pending=np.zeros(len(slots), np.bool_),
        num_decodes=int(behind[0]) if behind.size else len(slots),
        epochs=table.epochs[slots],
    )
