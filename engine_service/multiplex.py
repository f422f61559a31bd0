"""What one Multiplex stream hears: everything that happened to its slots in a step, in one packed message.

Knows no queue and no core; which slot belongs to which request is kept here.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable

from penstock.engine_service.core.messages import Finish, Logprobs, Started
from penstock.engine_service.events import finished_event, started_event, usage_message
from penstock.engine_service.live import Live
from penstock.engine_service.outgoing import Outgoing
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError


class MultiplexSink:
    """The slots of one stream. Ends by itself once the caller has closed its side and all slots are over."""

    def __init__(self, on_overflow: Callable[[], object]) -> None:
        self.outgoing: Outgoing[pb.MultiplexEvents] = Outgoing(on_overflow)
        self.slots: dict[int, Live] = {}
        self.preparing: dict[int, asyncio.Task[None]] = {}  # slots whose start is not yet answered
        self._half_closed = False
        self._reset()

    # ------------------------------------------------------------------ from the servicer

    def answer(self, accepted: list[int], errors: list[pb.SlotError]) -> None:
        """Tells at once which starts were taken and which were not."""
        if accepted or errors:
            self.outgoing.put(pb.MultiplexEvents(accepted=accepted, errors=errors))

    def prepare(self, slot: int, start: Callable[[], Awaitable[None]]) -> None:
        """Runs a start that answers later."""

        async def run() -> None:
            try:
                await start()
            finally:
                if self.preparing.get(slot) is task:
                    del self.preparing[slot]
                self._end_if_over()

        task = asyncio.create_task(run())
        self.preparing[slot] = task

    def cancel_preparing(self, slots: Iterable[int] | None = None) -> None:
        """Gives up these slots' starts, None: all; nothing more is sent for them."""
        for slot in list(self.preparing) if slots is None else slots:
            task = self.preparing.pop(slot, None)
            if task is not None:
                task.cancel()

    def close_input(self) -> None:
        """The caller starts nothing any more."""
        self._half_closed = True
        self._end_if_over()

    # ------------------------------------------------------------------ from the client

    def on_started(self, live: Live, started: Started) -> None:
        self._started.append(
            pb.SlotStarted(slot=live.tag, usage=usage_message(live.usage), started=started_event(started))
        )

    def on_token(
        self, live: Live, choice: int, token: int, completion_tokens: int, logprobs: Logprobs | None
    ) -> None:
        if logprobs is not None:
            self._rows[len(self._slots)] = logprobs
        self._slots.append(live.tag)
        self._choices.append(choice)
        self._ids.append(token)
        self._completion_tokens.append(completion_tokens)

    def on_finished(self, live: Live, finish: Finish) -> None:
        self._finished.append(
            pb.SlotFinished(
                slot=live.tag,
                choice=finish.choice,
                finished=finished_event(finish),
                usage=usage_message(finish.usage),
            )
        )
        if live.num_finished == live.params.n:
            self._free(live)

    def on_error(self, live: Live, error: ApiError) -> None:
        self._errors.append(slot_error(live.tag, error, live))
        self._free(live)

    def end_step(self, step: int) -> None:
        events = pb.MultiplexEvents(
            step=step,
            token_slots=self._slots,
            token_choices=self._choices if any(self._choices) else (),
            token_ids=self._ids,
            completion_tokens=self._completion_tokens,
            started=self._started,
            finished=self._finished,
            errors=self._errors,
        )
        if self._rows:
            self._add_rows(events)
        self._reset()
        self.outgoing.put(events)
        self._end_if_over()

    # ------------------------------------------------------------------ inside

    def _add_rows(self, events: pb.MultiplexEvents) -> None:
        for index in range(len(self._slots)):
            row = self._rows.get(index)
            if row is None:
                events.token_logprobs.append(math.nan)
                events.token_ranks.append(0)
                events.alternative_counts.append(0)
                continue
            events.token_logprobs.append(row.logprobs[0])
            events.token_ranks.append(row.ranks[0])
            events.alternative_counts.append(row.num_alternatives)
            events.alternative_ids.extend(row.alternative_ids)
            events.alternative_logprobs.extend(row.alternative_logprobs)

    def _free(self, live: Live) -> None:
        if self.slots.get(live.tag) is live:
            del self.slots[live.tag]

    def _end_if_over(self) -> None:
        if self._half_closed and not self.slots and not self.preparing:
            self.outgoing.end()

    def _reset(self) -> None:
        self._slots: list[int] = []
        self._choices: list[int] = []
        self._ids: list[int] = []
        self._completion_tokens: list[int] = []
        self._rows: dict[int, Logprobs] = {}
        self._started: list[pb.SlotStarted] = []
        self._finished: list[pb.SlotFinished] = []
        self._errors: list[pb.SlotError] = []


def slot_error(slot: int, error: ApiError, live: Live | None = None) -> pb.SlotError:
    """The error as the stream tells it; for a Generate call it would be the status."""
    return pb.SlotError(
        slot=slot,
        grpc_code=error.kind.grpc_status.value[0],
        reason=error.reason.upper(),
        message=error.message,
        param=error.param or "",
        retry_after_us=int(error.retry_after_s * 1e6),
        usage=None if live is None else usage_message(live.usage),
    )
