"""Which rows of a step are sampled, and which of the samples count: drafts are verified here. Knows no
logits.

A row with a draft is sampled behind its last token and behind each drafted one. Each sample is drawn with the
random number of its own position, so as long as the samples repeat the draft they are what a step each would
have given; the first that does not is the last to count.
"""

from __future__ import annotations

import numpy as np

from penstock.engine_service.core.messages import Logprobs
from penstock.engine_service.core.plan import StepPlan, StepResult
from penstock.engine_service.core.sampler import SampledRows, SampleRows
from penstock.engine_service.core.slots import Int32s, Int64s


def sample_rows(plan: StepPlan, query_starts: list[int]) -> tuple[SampleRows, Int64s]:
    """The rows to sample, in the plan's order, and the query row of each."""
    starts = np.array(query_starts, np.int64)
    if not plan.drafts:
        if plan.samples.all():
            return SampleRows(plan.sequences, plan.slots, plan.epochs), starts + plan.counts - 1
        rows = np.flatnonzero(plan.samples)
    else:
        numbers = plan.samples.astype(np.int64)
        for row, draft in plan.drafts.items():
            numbers[row] += len(draft)
        rows = np.repeat(np.arange(len(plan)), numbers)
    places = starts[rows] + plan.counts[rows] - 1
    sampled = SampleRows([plan.sequences[row] for row in rows.tolist()], plan.slots[rows], plan.epochs[rows])
    if plan.drafts:
        # Behind the draft's tokens: row 0 of a draft of 2 is sampled two query rows before the last.
        firsts = np.searchsorted(rows, rows)
        lengths = np.zeros(len(plan), np.int64)
        for row, draft in plan.drafts.items():
            lengths[row] = len(draft)
        places += np.arange(len(rows)) - firsts - lengths[rows]
        sampled.drafted = drafted_rows(plan, rows)
    return sampled, places


def drafted_rows(plan: StepPlan, rows: Int64s) -> dict[int, Int32s]:
    """rows [R]: the plan's row of each sampled one, ascending. By sampled row: the drafted ids it is behind,
    for those that are behind any."""
    found: dict[int, Int32s] = {}
    for row, draft in plan.drafts.items():
        first = int(np.searchsorted(rows, row))
        found.update((first + count, draft[:count]) for count in range(1, len(draft) + 1))
    return found


def accept(plan: StepPlan, rows: SampleRows, sampled: SampledRows, result: StepResult) -> None:
    """Puts what was sampled for `rows` into the result; a row's earlier error stands."""
    if not plan.drafts:
        _accept_plain(plan, sampled, result)
        return
    width = 1 + max(map(len, plan.drafts.values()))
    result.tokens = np.zeros((len(plan), width), np.int32)
    first = 0
    for row in np.flatnonzero(plan.samples).tolist():
        draft = plan.drafts.get(row)
        count = 1 if draft is None else 1 + len(draft)
        if row not in result.errors:
            _accept_row(plan, row, first, sampled, result)
        first += count


def _accept_plain(plan: StepPlan, sampled: SampledRows, result: StepResult) -> None:
    places = np.flatnonzero(plan.samples)
    result.tokens[places, 0] = sampled.tokens
    result.num_tokens[places] = 1
    for index, error in sampled.errors.items():
        result.errors.setdefault(int(places[index]), error)
    for index, rows in sampled.logprobs.items():
        result.logprobs[int(places[index])] = rows
    result.ended.update(int(places[index]) for index in sampled.ended)
    for row in result.errors:
        result.num_tokens[row] = 0
        result.logprobs.pop(row, None)


def _accept_row(plan: StepPlan, row: int, first: int, sampled: SampledRows, result: StepResult) -> None:
    draft = plan.drafts.get(row)
    tokens = sampled.tokens[first : first + 1 + (0 if draft is None else len(draft))]
    wrong = np.flatnonzero(tokens[:-1] != draft) if draft is not None else np.empty(0, np.int64)
    count = int(wrong[0]) + 1 if wrong.size else len(tokens)
    for index in range(count):
        error = sampled.errors.get(first + index)
        if error is not None:
            if index == 0:
                result.errors[row] = error
            # What came before stands; the error comes again if the sequence gets there.
            count = index
            break
        if first + index in sampled.ended:
            result.ended.add(row)
            count = index + 1
            break
    result.tokens[row, :count] = tokens[:count]
    result.num_tokens[row] = count
    found = [sampled.logprobs[first + index] for index in range(count) if first + index in sampled.logprobs]
    if found:
        result.logprobs[row] = _joined(found)


def _joined(rows: list[Logprobs]) -> Logprobs:
    total = Logprobs([], [], rows[0].num_alternatives, [], [])
    for own in rows:
        total.logprobs += own.logprobs
        total.ranks += own.ranks
        total.alternative_ids += own.alternative_ids
        total.alternative_logprobs += own.alternative_logprobs
    return total
