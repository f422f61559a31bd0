"""What happens after a step as a whole has failed: who is tried again, who is refused, when to give up.

A first failure puts all that was in the step into quarantine (computed again, one sequence at a time, with
the same output). A request that was in two failing steps is refused. Several failures in a row without one
good step mean the device is gone: the process ends and its parent starts a new one. Requests that were only
waiting never notice.
"""

from __future__ import annotations

import logging

from penstock.engine_service.core.messages import RequestError
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.request import Request
from penstock.engine_service.core.scheduler import Scheduler

log = logging.getLogger("penstock.engine.faults")

MAX_STRIKES = 2
MAX_FAILURES_IN_A_ROW = 8


class EngineFatal(Exception):
    """The core cannot go on; the process ends with 1."""


class FaultPolicy:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._strikes: dict[int, int] = {}
        self._in_a_row = 0

    def step_succeeded(self) -> None:
        self._in_a_row = 0

    def step_failed(self, plan: StepPlan, error: Exception) -> list[tuple[Request, RequestError]]:
        """The requests to refuse, with their errors; the rest of the plan is in quarantine. Raises
        EngineFatal after too many failures in a row."""
        log.error("a step with %d sequences failed", len(plan), exc_info=error)
        self._in_a_row += 1
        if self._in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise EngineFatal("every step fails") from error
        requests = {sequence.request.id: sequence.request for sequence in plan.sequences}
        refused = []
        for request in requests.values():
            strikes = self._strikes.get(request.id, 0) + 1
            self._strikes[request.id] = strikes
            if strikes >= MAX_STRIKES:
                refused.append((request, refusal(error)))
        self._scheduler.quarantine(plan)
        self._forget_ended()
        return refused

    def _forget_ended(self) -> None:
        for request_id in [known for known in self._strikes if self._scheduler.get(known) is None]:
            del self._strikes[request_id]


def refusal(error: Exception) -> RequestError:
    """What a request hears whose step failed with `error`."""
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return RequestError("engine_overloaded", "The device ran out of memory.")
    return RequestError("engine_lost", "The engine failed while it computed the request.")
