"""Plans made by hand, and a step's result row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.engine_service.core.messages import Logprobs, RequestError
from penstock.engine_service.core.plan import StepPlan, StepResult
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.slots import SlotTable


def plan_rows(
    table: SlotTable, work: list[tuple[Sequence, int]], drafts: dict[int, list[int]] | None = None
) -> StepPlan:
    """A plan of so many tokens of each sequence, in this order; drafts by place in `work` are among them."""
    slots = np.array([sequence.slot for sequence, _ in work], np.int64)
    counts = np.array([count for _, count in work], np.int32)
    starts = table.num_computed[slots]
    lengths = np.zeros(len(work), np.int32)
    for row, draft in (drafts or {}).items():
        lengths[row] = len(draft)
    ones = [
        count == 1
        and (s.sampling.prompt_logprobs is None or s.num_computed_tokens + 1 >= s.num_prompt_tokens)
        for s, count in work
    ]
    return StepPlan(
        table,
        [sequence for sequence, _ in work],
        slots,
        starts,
        counts,
        samples=starts + counts - lengths == table.num_tokens[slots],
        pending=np.zeros(len(work), np.bool_),
        num_decodes=[*ones, False].index(False),
        drafts={row: np.array(draft, np.int32) for row, draft in (drafts or {}).items()},
        epochs=table.epochs[slots],
    )


@dataclass
class RowResult:
    """One row of a step's result."""

    tokens: list[int]
    error: RequestError | None
    prompt_logprobs: Logprobs | None
    logprobs: Logprobs | None


def results_of(result: StepResult) -> list[RowResult]:
    return [
        RowResult(
            result.tokens[row, :count].tolist(),
            result.errors.get(row),
            result.prompt_logprobs.get(row),
            result.logprobs.get(row),
        )
        for row, count in enumerate(result.num_tokens.tolist())
    ]
