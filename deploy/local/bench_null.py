"""A runner that computes nothing: what remains of a step's time is the loop's own. Knows no model."""

from __future__ import annotations

import numpy as np

from penstock.engine_service.core.plan import StepPlan, StepResult

_TOKEN = 7


class NullRunner:
    """Answers every row that samples with the same token, at once."""

    lookahead = True
    guide = None

    def start(self, plan: StepPlan) -> _Done:
        return _Done(plan)

    def needs_host_tokens(self, sequence: object) -> bool:
        return False

    def forget(self, sequence: object) -> None:
        return


class _Done:
    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan

    def wait(self) -> StepResult:
        step = self._plan
        return StepResult(np.full((len(step), 1), _TOKEN, np.int32), step.samples.astype(np.int32))
