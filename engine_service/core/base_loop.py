"""What every loop of a core does: receive, take a turn, send. Knows neither schedulers nor models."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from penstock.engine_service.core import clock, messages
from penstock.engine_service.core.inbox import Inbox, Outbox
from penstock.engine_service.core.messages import AddPooled, AddRequest, RequestError
from penstock.engine_service.core.report import Counters, StepReport

log = logging.getLogger("penstock.engine.loop")

# Nothing is due in an idle loop: messages wake it, and deadlines are waited for.
_IDLE_WAIT_S = 60.0
# When nothing has come for so long, hardly anybody is about to wait.
_QUIET_S = 1.0


class BaseLoop(ABC):
    """One thread; `step` never waits longer than the next deadline, and not at all while there is work."""

    def __init__(self, inbox: Inbox, outbox: Outbox, when_quiet: Callable[[], None] | None = None) -> None:
        """when_quiet: called once, when the loop has had nothing to do for a while."""
        self._inbox = inbox
        self._outbox = outbox
        self._when_quiet = when_quiet
        self.counters = Counters()
        self._shutdown = False

    @property
    @abstractmethod
    def has_work(self) -> bool: ...

    @property
    @abstractmethod
    def next_deadline_us(self) -> int | None:
        """The earliest of a live request, monotonic microseconds."""

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Tokens of the longest request that can be served."""

    @abstractmethod
    def load(self) -> messages.Load: ...

    @abstractmethod
    def _receive(self, message: messages.ToCore | messages.Prepared, report: StepReport) -> None:
        """Takes in a message, any but those that all loops answer alike. An error of one request ends that
        request."""

    @abstractmethod
    def _turn(self, report: StepReport) -> bool:
        """Works on, one step at most; whether one was finished."""

    def run(self) -> None:
        """Runs until a Shutdown message or the end of the inbox. Raises EngineFatal when no step succeeds."""
        while not (self._shutdown or self._inbox.closed):
            if self._when_quiet is not None and not self.has_work:
                self._wait_for_quiet(self._when_quiet)
            self.step(self._idle_wait_s())

    def _wait_for_quiet(self, work: Callable[[], None]) -> None:
        """Does the work unless a message comes first, or a deadline."""
        if self._idle_wait_s() < _QUIET_S or self._inbox.wait(_QUIET_S):
            return
        self._when_quiet = None
        try:
            work()
        except Exception:
            log.exception("what was put off until now failed")

    def step(self, wait_s: float = 0.0) -> None:
        """One turn. wait_s: longest wait for a first message when there is no work."""
        report = StepReport(self.counters)
        for message in self._inbox.take(0.0 if self.has_work else wait_s):
            match message:
                case messages.Ping():
                    self._outbox.send(messages.Pong(message.serial, self.load()))
                case messages.Shutdown():
                    self._shutdown = True
                case _:
                    self._receive(message, report)
        finished = self._turn(report)
        if finished or not report.empty:
            self._outbox.send(report.build(self.load()))

    def _refuse(self, params: AddRequest | AddPooled, error: RequestError, report: StepReport) -> None:
        """A request that is not even taken in."""
        self.counters.accepted += 1
        self._fail(params, error, report)

    def _fail(self, params: AddRequest | AddPooled, error: RequestError, report: StepReport) -> None:
        self.counters.failed += 1
        report.add_failure(params.id, error, messages.Usage(len(params.prompt)))

    def _idle_wait_s(self) -> float:
        deadline = self.next_deadline_us
        if deadline is None:
            return _IDLE_WAIT_S
        return min(_IDLE_WAIT_S, max(0.0, (deadline - clock.monotonic_us()) / 1e6))


def wrong_task(served: str) -> RequestError:
    """The error of a request for something else than what the model is for."""
    return RequestError("invalid_value", f"This model serves {served}.", "model")
