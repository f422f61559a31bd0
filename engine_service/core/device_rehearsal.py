"""Steps as large as any that will come, over no request's blocks: for measuring memory, and so that whatever
a first step makes is made before serving. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from penstock.engine_service.core.device_step import StepLimits
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.plan import Runner, StepPlan
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.slots import Int32s, SlotTable

# What takes the most memory a row: a copy of the logits to edit, cut and ranked besides. All sequences of a
# step may ask for it, or for a form, which takes as much.
_HEAVIEST = Sampling(temperature=0.7, top_p=0.9, top_k=20, logprobs=20, logit_bias={0: 1.0})
# One of each kind, each of which runs kernels of its own.
_KINDS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.7, top_p=0.9, top_k=20),
    Sampling(temperature=1.0, logprobs=5),
    Sampling(temperature=0.0, presence_penalty=0.5, repetition_penalty=1.1, logit_bias={0: 1.0}),
    Sampling(temperature=1.0, min_p=0.1),
)
_PROMPT_LOGPROBS = 20
_FIRST_ID = -(1 << 40)  # no request's


def rehearse(runner: Runner, limits: StepLimits) -> None:
    """Runs the largest steps there are, prompts, then decodes, then decodes with drafts, and a small one with
    each kind of sampling.

    All of them share the block for padding, where anything may stand, so that what they compute means
    nothing, and a row may end in an error. Raises whatever a step as a whole raises.
    """
    seqs, tokens = limits.max_num_seqs, limits.max_num_tokens
    for num_seqs, num_tokens in ((seqs, tokens), (1, tokens)):
        _rehearse(runner, limits, num_seqs, num_tokens, (_HEAVIEST,))
    few = min(len(_KINDS), seqs)
    # Whom penalties change has no drafts.
    _rehearse(runner, replace(limits, max_num_drafted=0), few, min(3 * few, tokens), _KINDS)


def _rehearse(
    runner: Runner, limits: StepLimits, num_seqs: int, num_tokens: int, kinds: tuple[Sampling, ...]
) -> None:
    """The sequences of a step take the kinds in turn."""
    table = SlotTable(limits.num_slots, limits.max_model_len, limits.block_size)
    lengths = _lengths(num_seqs, num_tokens, max(1, limits.max_model_len - 1))
    sequences = [_sequence(i, length, kinds[i % len(kinds)]) for i, length in enumerate(lengths)]
    steps = list(_steps(lengths, limits))
    needed = np.minimum(np.sum(steps, axis=0), limits.max_model_len)
    for slot, sequence in enumerate(sequences):
        table.take(slot, sequence)
        table.append_blocks(slot, [limits.num_blocks] * -(-int(needed[slot]) // limits.block_size))
    try:
        for number, counts in enumerate(steps):
            plan = _plan(table, sequences, counts, drafted=number > 0)
            result = runner.start(plan).wait()
            slots = plan.slots
            table.num_computed[slots] = table.num_tokens[slots]
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


def _steps(lengths: list[int], limits: StepLimits) -> Iterator[Int32s]:
    """Tokens of each sequence: its prompt, one more, and one more with a draft, as long as all have room."""
    counts = np.array(lengths, np.int32)
    yield counts
    if lengths[-1] < limits.max_model_len:
        yield np.ones_like(counts)
    drafted = min(limits.max_num_drafted, limits.max_num_tokens - len(lengths))
    room = limits.max_model_len - lengths[-1] - 2  # behind the prompt, what it brought and one more
    if drafted > 0 and room > 0:
        yield 1 + np.array(_lengths(len(lengths), drafted, room), np.int32)


def _sequence(number: int, length: int, sampling: Sampling) -> Sequence:
    if length > 2 and number == 0:
        sampling = replace(sampling, prompt_logprobs=_PROMPT_LOGPROBS)
    params = AddRequest(_FIRST_ID - number, [0] * length, sampling, max_new_tokens=2)
    return Request.create(params).sequences[0]


def _plan(table: SlotTable, sequences: list[Sequence], counts: Int32s, *, drafted: bool) -> StepPlan:
    slots = np.array([sequence.slot for sequence in sequences], np.int64)
    behind = np.flatnonzero(counts > 1)
    drafts = {row: np.zeros(counts[row] - 1, np.int32) for row in behind.tolist()} if drafted else {}
    return StepPlan(
        table=table,
        sequences=sequences,
        slots=slots,
        starts=table.num_computed[slots],
        counts=counts,
        samples=np.ones(len(slots), np.bool_),
        pending=np.zeros(len(slots), np.bool_),
        num_decodes=int(behind[0]) if behind.size else len(slots),
        drafts=drafts,
        epochs=table.epochs[slots],
    )
