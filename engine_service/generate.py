"""What one Generate call hears: step events of one request as GenerateEvents. Knows no queue and no core."""

from __future__ import annotations

from collections.abc import Callable

from penstock.engine_service.core.messages import Finish, Logprobs, Started
from penstock.engine_service.events import finished_event, started_event, usage_message
from penstock.engine_service.live import Live
from penstock.engine_service.outgoing import Outgoing
from penstock.protos import common_pb2
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError


class GenerateSink:
    """The events of a request in the order they happened; tokens of one step and choice share an event."""

    def __init__(self, on_overflow: Callable[[], object]) -> None:
        self.outgoing: Outgoing[pb.GenerateEvent] = Outgoing(on_overflow)
        self._deltas: dict[int, pb.GenerateEvent] = {}

    def on_started(self, live: Live, started: Started) -> None:
        self._put(live, 0, started=started_event(started))

    def on_token(
        self, live: Live, choice: int, token: int, completion_tokens: int, logprobs: Logprobs | None
    ) -> None:
        event = self._deltas.get(choice)
        if event is None:
            event = self._deltas[choice] = pb.GenerateEvent(request_id=live.request_id, choice=choice)
        event.delta.token_ids.append(token)
        if logprobs is not None:
            _append_rows(event.delta.logprobs, logprobs)
        event.usage.CopyFrom(
            common_pb2.Usage(
                prompt_tokens=live.usage.prompt_tokens,
                cached_tokens=live.usage.cached_tokens,
                completion_tokens=completion_tokens,
            )
        )

    def on_finished(self, live: Live, finish: Finish) -> None:
        self._flush()
        self._put(live, finish.choice, finished=finished_event(finish))
        if live.num_finished == live.params.n:
            self.outgoing.end()

    def on_error(self, live: Live, error: ApiError) -> None:
        self._flush()
        self.outgoing.end(error)

    def end_step(self, step: int) -> None:
        self._flush()

    def _put(
        self,
        live: Live,
        choice: int,
        *,
        started: pb.Started | None = None,
        finished: pb.Finished | None = None,
    ) -> None:
        self.outgoing.put(
            pb.GenerateEvent(
                request_id=live.request_id,
                choice=choice,
                started=started,
                finished=finished,
                usage=usage_message(live.usage),
            )
        )

    def _flush(self) -> None:
        for event in self._deltas.values():
            self.outgoing.put(event)
        self._deltas.clear()


def _append_rows(target: pb.TokenLogprobs, rows: Logprobs) -> None:
    target.logprobs.extend(rows.logprobs)
    target.ranks.extend(rows.ranks)
    target.num_alternatives = rows.num_alternatives
    target.alternative_ids.extend(rows.alternative_ids)
    target.alternative_logprobs.extend(rows.alternative_logprobs)
