"""Takes steps from plan to report, one step ahead of the device where the runner can. Knows no messages.

With lookahead a turn plans and starts step N + 1, counting on the tokens of step N, before it waits for step
N; so the device always has a next step. Otherwise a turn waits for the step that it started.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from penstock.engine_service.core import clock
from penstock.engine_service.core.faults import FaultPolicy
from penstock.engine_service.core.plan import Runner, Step, StepPlan, StepResult
from penstock.engine_service.core.postprocess import Postprocessor
from penstock.engine_service.core.report import Counters, StepReport
from penstock.engine_service.core.scheduler import Scheduler

log = logging.getLogger("penstock.engine.pipeline")


class _Flight(NamedTuple):
    plan: StepPlan
    step: Step


class Pipeline:
    """At most one step is in flight between two turns."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, postprocessor: Postprocessor, counters: Counters
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._postprocessor = postprocessor
        self._counters = counters
        self._faults = FaultPolicy(scheduler)
        self._flight: _Flight | None = None

    @property
    def busy(self) -> bool:
        return self._flight is not None

    def turn(self, report: StepReport) -> bool:
        """Starts the next step if there is work, and finishes the one before it. Whether one was finished.

        Raises EngineFatal when no step succeeds.
        """
        try:
            return self._turn(report)
        except BaseException:
            self._flight = None
            self._scheduler.abandon()
            raise

    def _turn(self, report: StepReport) -> bool:
        before, finished = self._flight, False
        plan = None if before is not None and isinstance(before.step, _Failed) else self._plan(report)
        if plan is None and before is not None:
            # What comes next depends on what is in flight.
            self._finish(before, None, report)
            before, finished, self._flight = None, True, None
            plan = self._plan(report)
        started = self._start(plan) if plan is not None and len(plan) else None
        if not self._runner.lookahead:
            before, started = started, None
        if before is not None:
            started = self._finish(before, started, report)
            finished = True
        self._flight = started
        return finished

    def _plan(self, report: StepReport) -> StepPlan | None:
        now_us = clock.monotonic_us()
        for request, error in self._scheduler.expire(now_us):
            self._postprocessor.failed(request, error, report)
        plan, casualties = self._scheduler.schedule(now_us, in_flight=self._flight is not None)
        for request, error in casualties:
            self._postprocessor.failed(request, error, report)
        return plan

    def _start(self, plan: StepPlan) -> _Flight:
        self._counters.steps += 1
        try:
            return _Flight(plan, self._runner.start(plan))
        except Exception as error:
            return _Flight(plan, _Failed(error))

    def _finish(self, flight: _Flight, following: _Flight | None, report: StepReport) -> _Flight | None:
        """Waits for a step and takes in its results; `following` was started behind it. What is in flight
        now: when the step has failed, what followed it counted on tokens that never came, and is waited for
        too."""
        plan = flight.plan
        try:
            result = flight.step.wait()
            _check(result, plan)
        except Exception as error:
            self._discard(following)
            self._scheduler.completed(plan if following is None else following.plan)
            for request, refusal in self._faults.step_failed(plan, error):
                self._postprocessor.fail(request, refusal, report)
            if following is not None:
                self._scheduler.requeue(following.plan)
            return None
        self._scheduler.completed(plan)
        self._faults.step_succeeded()
        self._postprocessor.apply(plan, result, report, clock.monotonic_us())
        return following

    def _discard(self, flight: _Flight | None) -> None:
        if flight is None:
            return
        try:
            flight.step.wait()
        except Exception:
            log.warning("the step behind a failed one failed too", exc_info=True)


class _Failed:
    """A step that could not be started: what went wrong shows when it is waited for."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self) -> StepResult:
        raise self._error


def _check(result: StepResult, plan: StepPlan) -> None:
    rows = len(plan)
    if result.tokens.ndim != 2 or len(result.tokens) != rows or result.num_tokens.shape != (rows,):
        raise RuntimeError(f"results of shape {result.tokens.shape} for {rows} sequences")
