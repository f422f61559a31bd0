"""A live request, and what hears of it: the two sides of the client's dealing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from penstock.engine_service.core.messages import (
    AddPooled,
    AddRequest,
    Finish,
    Logprobs,
    Started,
    Usage,
)
from penstock.protos.errors import ApiError


@dataclass(slots=True, eq=False)
class Live:
    """A request between its acceptance and its end. `tag` is the sink's own (a slot)."""

    params: AddRequest | AddPooled
    request_id: str  # the caller's
    sink: Sink
    tag: int = 0
    sent: bool = False  # to the core that lives now
    started: bool = False
    lost: bool = False  # was with a core that died
    num_finished: int = 0
    usage: Usage = field(default_factory=Usage)

    @property
    def id(self) -> int:
        return self.params.id


class Sink(Protocol):
    """Receives what happens to the requests of one stream, synchronously; must not block. After the calls of
    a step comes one end_step. No call for a request comes after its last finish, or its error."""

    def on_started(self, live: Live, started: Started) -> None: ...

    def on_token(
        self, live: Live, choice: int, token: int, completion_tokens: int, logprobs: Logprobs | None
    ) -> None: ...

    def on_finished(self, live: Live, finish: Finish) -> None: ...

    def on_error(self, live: Live, error: ApiError) -> None: ...

    def end_step(self, step: int) -> None: ...
