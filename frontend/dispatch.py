"""Spreads the engine's step messages over the requests they belong to.

One message holds a whole step in parallel arrays; the plain case (one token of a request that wants text
only) takes the short way. Knows no connection: engines.py feeds it.
"""

from __future__ import annotations

from typing import Protocol

from penstock.frontend.logprobs import LogprobRow
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError, from_parts

_UNAVAILABLE = 14


class Receiver(Protocol):
    """One request, as the dispatcher sees it. See generation.Generation."""

    wants_logprobs: bool

    def on_accepted(self) -> None: ...

    def on_started(self, event: engine_pb2.SlotStarted) -> None: ...

    def on_token(self, index: int, token_id: int) -> None: ...

    def on_tokens(
        self, index: int, token_ids: list[int], rows: list[LogprobRow], ends_with_eos: bool
    ) -> None: ...

    def on_finished(self, event: engine_pb2.SlotFinished) -> None: ...

    def on_refused(self, error: ApiError, *, retryable: bool) -> None: ...

    def crash(self) -> None: ...


class Dispatcher:
    """The live slots of one stream. A receiver leaves by `live.pop`; events for a slot that left are
    dropped."""

    def __init__(self) -> None:
        self.live: dict[int, Receiver] = {}

    def dispatch(self, events: engine_pb2.MultiplexEvents) -> None:
        """Calls every receiver of the step, in the order accepted, started, tokens, finished, errors. What a
        receiver raises ends that request alone."""
        live = self.live
        for slot in events.accepted:
            if (receiver := live.get(slot)) is not None:
                try:
                    receiver.on_accepted()
                except Exception:
                    receiver.crash()
        for started in events.started:
            if (receiver := live.get(started.slot)) is not None:
                try:
                    receiver.on_started(started)
                except Exception:
                    receiver.crash()
        self._tokens(events)
        for finished in events.finished:
            if (receiver := live.get(finished.slot)) is not None:
                try:
                    receiver.on_finished(finished)
                except Exception:
                    receiver.crash()
        for error in events.errors:
            if (receiver := live.pop(error.slot, None)) is not None:
                _refuse(receiver, _api_error(error), retryable=error.grpc_code == _UNAVAILABLE)

    def fail_all(self, error: ApiError, *, retryable: bool) -> None:
        """Ends every live request, or lets it move to another engine."""
        receivers = list(self.live.values())
        self.live.clear()
        for receiver in receivers:
            _refuse(receiver, error, retryable=retryable)

    def _tokens(self, events: engine_pb2.MultiplexEvents) -> None:
        slots = list(events.token_slots)
        if not slots:
            return
        choices = list(events.token_choices) or [0] * len(slots)
        careful = _slots_needing_care(events, slots)
        live = self.live
        later = False
        for slot, choice, token_id in zip(slots, choices, events.token_ids, strict=True):
            receiver = live.get(slot)
            if receiver is None:
                continue
            if receiver.wants_logprobs or slot in careful:
                later = True
                continue
            try:
                receiver.on_token(choice, token_id)
            except Exception:
                receiver.crash()
        if later:
            self._grouped_tokens(events, slots, choices, careful)

    def _grouped_tokens(
        self, events: engine_pb2.MultiplexEvents, slots: list[int], choices: list[int], careful: set[int]
    ) -> None:
        ids = list(events.token_ids)
        rows = _LogprobRows(events)
        groups: dict[tuple[int, int], list[int]] = {}
        for i, slot in enumerate(slots):
            receiver = self.live.get(slot)
            if receiver is not None and (receiver.wants_logprobs or slot in careful):
                groups.setdefault((slot, choices[i]), []).append(i)
        ends = {(item.slot, item.choice) for item in events.finished if item.finished.stopped_by_eos}
        for (slot, choice), indices in groups.items():
            receiver = self.live.get(slot)
            if receiver is None:  # ended by an earlier choice of this step
                continue
            try:
                wanted = [rows.row(i) for i in indices] if receiver.wants_logprobs else []
                receiver.on_tokens(choice, [ids[i] for i in indices], wanted, (slot, choice) in ends)
            except Exception:
                receiver.crash()


class _LogprobRows:
    """The log-probability arrays of a step, cut into rows. Alternatives of all tokens lie one after the
    other."""

    def __init__(self, events: engine_pb2.MultiplexEvents) -> None:
        self._logprobs = events.token_logprobs
        self._ranks = events.token_ranks
        self._ids = list(events.alternative_ids)
        self._values = list(events.alternative_logprobs)
        self._starts = [0]
        for count in events.alternative_counts:
            self._starts.append(self._starts[-1] + count)

    def row(self, i: int) -> LogprobRow:
        span = slice(self._starts[i], self._starts[i + 1])
        return self._logprobs[i], self._ranks[i], self._ids[span], self._values[span]


def _slots_needing_care(events: engine_pb2.MultiplexEvents, slots: list[int]) -> set[int]:
    """Slots with several tokens in this step, or with an end of sequence among them."""
    careful = {item.slot for item in events.finished if item.finished.stopped_by_eos}
    if len(set(slots)) != len(slots):
        seen: set[int] = set()
        for slot in slots:
            (careful if slot in seen else seen).add(slot)
    return careful


def _refuse(receiver: Receiver, error: ApiError, *, retryable: bool) -> None:
    try:
        receiver.on_refused(error, retryable=retryable)
    except Exception:
        receiver.crash()


def _api_error(error: engine_pb2.SlotError) -> ApiError:
    reason = error.reason.lower()
    retry_after_s = error.retry_after_us / 1e6 if error.retry_after_us else None
    return from_parts(reason, error.message, error.param or None, retry_after_s)
