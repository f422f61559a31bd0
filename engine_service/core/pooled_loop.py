"""The loop of a model without generation: receive, compute a step of inputs, answer what is complete."""

from __future__ import annotations

import logging
from typing import Protocol

from penstock.engine_service.core import clock, messages
from penstock.engine_service.core.base_loop import BaseLoop, wrong_task
from penstock.engine_service.core.faults import MAX_FAILURES_IN_A_ROW, EngineFatal, refusal
from penstock.engine_service.core.inbox import Inbox, Outbox
from penstock.engine_service.core.messages import ABORTED, STOP, RequestError
from penstock.engine_service.core.pooled_call import PooledCall, PooledInput, Rows
from penstock.engine_service.core.pooled_queue import PooledQueue
from penstock.engine_service.core.report import StepReport

log = logging.getLogger("penstock.engine.pooled")


class PooledRunner(Protocol):
    @property
    def max_step_tokens(self) -> int:
        """Beyond it a step is longer and nothing else."""

    def run(self, inputs: list[PooledInput]) -> list[Rows | RequestError]:
        """What each input was computed for, or its own error. An exception means that the step as a whole
        failed."""


class PooledLoop(BaseLoop):
    """Queue and runner behind one inbox. An error of an input ends its request, and no other."""

    def __init__(
        self,
        runner: PooledRunner,
        inbox: Inbox,
        outbox: Outbox,
        *,
        tasks: list[str],
        max_batched_tokens: int,
        max_inputs: int,
        max_input_tokens: int,
    ) -> None:
        super().__init__(inbox, outbox)
        self._runner = runner
        self._tasks = ", ".join(tasks)
        self._max_input_tokens = max_input_tokens
        self.queue = PooledQueue(
            max_batched_tokens=max_batched_tokens, max_inputs=max_inputs, max_input_tokens=max_input_tokens
        )
        self._failures_in_a_row = 0

    @property
    def has_work(self) -> bool:
        return self.queue.has_work

    @property
    def max_model_len(self) -> int:
        return self._max_input_tokens

    @property
    def next_deadline_us(self) -> int | None:
        return self.queue.next_deadline_us

    def load(self) -> messages.Load:
        return self.counters.fill(self.queue.load())

    def _receive(self, message: messages.ToCore | messages.Prepared, report: StepReport) -> None:
        match message:
            case messages.AddPooled():
                self._add(message, report)
            case messages.AddRequest():
                self._refuse(message, wrong_task(self._tasks), report)
            case messages.AbortRequests():
                for request_id in message.ids:
                    self._abort(request_id, message.report, report)
            case messages.FlushCache():
                self._outbox.send(messages.CacheFlushed(message.serial, 0))

    def _turn(self, report: StepReport) -> bool:
        now_us = clock.monotonic_us()
        for call, error in self.queue.expire(now_us):
            self._fail(call.params, error, report)
        inputs, begun = self.queue.take(now_us)
        if not inputs:
            return False
        for call in begun:
            report.tell_started(call.started())
        self.counters.steps += 1
        for item, outcome in zip(inputs, self._compute(inputs), strict=True):
            self._apply(item, outcome, report)
        return True

    def _add(self, params: messages.AddPooled, report: StepReport) -> None:
        self.counters.accepted += 1
        try:
            self.queue.add(params)
        except RequestError as error:
            self._fail(params, error, report)
        except Exception:
            log.exception("adding request %d failed", params.id)
            self._fail(params, _internal(), report)

    def _abort(self, request_id: int, tell: bool, report: StepReport) -> None:
        call = self.queue.get(request_id)
        if call is None:
            return
        if tell:
            report.tell_finish(call.finish(ABORTED, clock.monotonic_us()))
        else:
            report.count_silent_end()
        self.queue.remove(call)
        self.counters.aborted += 1

    def _compute(self, inputs: list[PooledInput]) -> list[Rows | RequestError]:
        """A step that fails as a whole is taken again input by input, so that the next failure names its
        cause and the others live."""
        try:
            return self._run(inputs)
        except EngineFatal:
            raise
        except Exception as error:
            if len(inputs) == 1:
                return [refusal(error)]
        return [self._alone(item) for item in inputs]

    def _alone(self, item: PooledInput) -> Rows | RequestError:
        if item.call.over:
            return _internal()
        try:
            return self._run([item])[0]
        except EngineFatal:
            raise
        except Exception as error:
            # Its other inputs are not tried: one request must not look like a broken device.
            item.call.over = True
            return refusal(error)

    def _run(self, inputs: list[PooledInput]) -> list[Rows | RequestError]:
        try:
            outcomes = self._runner.run(inputs)
            if len(outcomes) != len(inputs):
                raise RuntimeError(f"{len(outcomes)} results for {len(inputs)} inputs")
        except Exception as error:
            log.error("a step with %d inputs failed", len(inputs), exc_info=error)
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise EngineFatal("every step fails") from error
            raise
        self._failures_in_a_row = 0
        return outcomes

    def _apply(self, item: PooledInput, outcome: Rows | RequestError, report: StepReport) -> None:
        call = item.call
        if self.queue.get(call.id) is not call:
            return
        if isinstance(outcome, RequestError):
            self._end(call, outcome, report)
            return
        self.counters.prompt_tokens += item.length
        try:
            call.add(item.number, outcome)
            if call.complete:
                report.tell_finish(call.finish(STOP, clock.monotonic_us(), call.answer()))
                self.queue.remove(call)
                self.counters.finished += 1
        except Exception:
            log.exception("answering request %d failed", call.id)
            self._end(call, _internal(), report)

    def _end(self, call: PooledCall, error: RequestError, report: StepReport) -> None:
        self.queue.remove(call)
        self._fail(call.params, error, report)


def _internal() -> RequestError:
    return RequestError("internal_error", "An internal error occurred.")
