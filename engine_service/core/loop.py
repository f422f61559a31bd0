"""The core's loop: receive, take steps, send. What each of them means is known elsewhere."""

from __future__ import annotations

import logging

from penstock.engine_service.core import clock, messages
from penstock.engine_service.core.constraints import Constraints
from penstock.engine_service.core.inbox import Inbox, Outbox
from penstock.engine_service.core.messages import RequestError
from penstock.engine_service.core.pipeline import Pipeline
from penstock.engine_service.core.plan import Drafter, Runner
from penstock.engine_service.core.postprocess import Postprocessor
from penstock.engine_service.core.report import Counters, StepReport
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.scheduler import Scheduler
from penstock.engine_service.core.speculation import make_drafter

log = logging.getLogger("penstock.engine.loop")

# Nothing is due in an idle loop: messages wake it, and deadlines are waited for.
_IDLE_WAIT_S = 60.0


class EngineLoop:
    """One thread; `step` never waits longer than the next deadline, and not at all while there is work."""

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
        self._runner = runner
        self._inbox = inbox
        self._outbox = outbox
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
        )
        self._constraints = constraints
        self.counters = Counters()
        self._postprocessor = Postprocessor(self.scheduler, self.counters)
        self._pipeline = Pipeline(runner, self.scheduler, self._postprocessor, self.counters)
        self._shutdown = False

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

    def run(self) -> None:
        """Runs until a Shutdown message or the end of the inbox. Raises EngineFatal when no step succeeds."""
        while not (self._shutdown or self._inbox.closed):
            self.step(self._idle_wait_s())

    def step(self, wait_s: float = 0.0) -> None:
        """One turn. wait_s: longest wait for a first message when there is no work."""
        report = StepReport(self.counters)
        for message in self._inbox.take(0.0 if self.has_work else wait_s):
            self._receive(message, report)
        finished = self._pipeline.turn(report)
        if finished or not report.empty:
            self._outbox.send(report.build(self.load()))

    def load(self) -> messages.Load:
        return self.counters.fill(self.scheduler.load())

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
            case messages.Ping():
                self._outbox.send(messages.Pong(message.serial, self.load()))
            case messages.FlushCache():
                freed = self.scheduler.flush_cache()
                self._outbox.send(messages.CacheFlushed(message.serial, freed))
            case messages.Shutdown():
                self._shutdown = True

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
            self.counters.failed += 1
            report.add_failure(params.id, error, messages.Usage(len(params.prompt)))

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

    def _idle_wait_s(self) -> float:
        deadline = self.scheduler.next_deadline_us
        if deadline is None:
            return _IDLE_WAIT_S
        return min(_IDLE_WAIT_S, max(0.0, (deadline - clock.monotonic_us()) / 1e6))
