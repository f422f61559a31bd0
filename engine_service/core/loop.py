"""The loop of a model that generates: receive, take steps, send. What each means is known elsewhere."""

from __future__ import annotations

import logging

from penstock.engine_service.core import clock, messages
from penstock.engine_service.core.base_loop import BaseLoop, wrong_task
from penstock.engine_service.core.constraints import Constraints
from penstock.engine_service.core.inbox import Inbox, Outbox
from penstock.engine_service.core.messages import RequestError
from penstock.engine_service.core.pipeline import Pipeline
from penstock.engine_service.core.plan import Drafter, Runner
from penstock.engine_service.core.postprocess import Postprocessor
from penstock.engine_service.core.report import StepReport
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.scheduler import Scheduler
from penstock.engine_service.core.speculation import make_drafter

log = logging.getLogger("penstock.engine.loop")


class EngineLoop(BaseLoop):
    """Scheduler, runner and postprocessor behind one inbox."""

    def __init__(
        self,
        runner: Runner,
        inbox: Inbox,
        outbox: Outbox,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        drafter: Drafter | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        super().__init__(inbox, outbox, None if constraints is None else constraints.warm_up)
        self._runner = runner
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            on_release=self._forget,
            is_exact=runner.needs_host_tokens,
            drafter=drafter,
            guide=runner.guide,
        )
        self._constraints = constraints
        self._postprocessor = Postprocessor(self.scheduler, self.counters)
        self._pipeline = Pipeline(runner, self.scheduler, self._postprocessor, self.counters)

    @classmethod
    def of_model(
        cls,
        configure: messages.Configure,
        ready: messages.Ready,
        runner: Runner,
        inbox: Inbox,
        outbox: Outbox,
        constraints: Constraints | None = None,
    ) -> EngineLoop:
        """The loop of a model that has been built as `configure` asked."""
        return cls(
            runner,
            inbox,
            outbox,
            num_blocks=ready.kv_blocks,
            block_size=ready.kv_block_size,
            max_num_seqs=configure.max_num_seqs,
            max_num_batched_tokens=configure.max_num_batched_tokens,
            max_model_len=ready.max_model_len,
            enable_prefix_caching=configure.enable_prefix_caching,
            drafter=make_drafter(configure, ready.device),
            constraints=constraints,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._pipeline.busy

    @property
    def max_model_len(self) -> int:
        return self.scheduler.max_model_len

    @property
    def next_deadline_us(self) -> int | None:
        return self.scheduler.next_deadline_us

    def load(self) -> messages.Load:
        return self.counters.fill(self.scheduler.load())

    def _turn(self, report: StepReport) -> bool:
        return self._pipeline.turn(report)

    def _receive(self, message: messages.ToCore | messages.Prepared, report: StepReport) -> None:
        match message:
            case messages.AddRequest():
                self._add(message, report)
            case messages.Prepared():
                self._prepared(message, report)
            case messages.AbortRequests():
                for request_id in message.ids:
                    self._abort(request_id, message.report, report)
            case messages.EndChoice():
                request = self.scheduler.get(message.id)
                if request is not None:
                    now_us = clock.monotonic_us()
                    self._postprocessor.end_choice(request, message.choice, report, now_us)
            case messages.FlushCache():
                freed = self.scheduler.flush_cache()
                self._outbox.send(messages.CacheFlushed(message.serial, freed))
            case messages.AddPooled():
                self._refuse(message, wrong_task("generate"), report)

    def _add(self, params: messages.AddRequest, report: StepReport) -> None:
        self.counters.accepted += 1
        try:
            if params.constraint is None:
                self.scheduler.add(params)
            else:
                self._add_constrained(params)
        except Exception as caught:
            error = caught
            if not isinstance(error, RequestError):
                log.exception("adding request %d failed", params.id)
                error = RequestError("internal_error", "An internal error occurred.")
            self._fail(params, error, report)

    def _add_constrained(self, params: messages.AddRequest) -> None:
        if self._constraints is None:
            raise RequestError("unimplemented", "This engine serves no constraints.", "constraint")
        self.scheduler.add(params, held=True)
        self._constraints.prepare(params, self._inbox)

    def _prepared(self, message: messages.Prepared, report: StepReport) -> None:
        """A held request goes into the queue, or ends."""
        request = self.scheduler.get(message.id)
        if request is None:
            return
        if message.error is not None:
            self._postprocessor.fail(request, message.error, report)
            return
        request.grammar = message.grammar
        self.scheduler.release(request)

    def _abort(self, request_id: int, tell: bool, report: StepReport) -> None:
        request = self.scheduler.get(request_id)
        if request is None:
            return
        if tell:
            report.add_aborted(request, clock.monotonic_us())
        else:
            report.count_silent_end()
        self.scheduler.remove(request)
        self._postprocessor.forget(request)
        self.counters.aborted += 1

    def _forget(self, sequence: Sequence) -> None:
        try:
            self._runner.forget(sequence)
        except Exception:
            log.exception("the runner could not forget request %d", sequence.request.id)
