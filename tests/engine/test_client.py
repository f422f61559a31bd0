"""The client's dealing: what fails for one request ends that request alone."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.engine_service.client import EngineClient
from penstock.engine_service.core.messages import AddRequest, Configure, Load, StepOutput
from penstock.engine_service.core_keeper import State
from penstock.engine_service.live import Live
from penstock.protos.errors import ApiError


class RecordingSink:
    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.tokens: list[int] = []
        self.errors: list[ApiError] = []
        self.steps = 0

    def on_started(self, *words: Any) -> None: ...

    def on_token(self, live: Live, choice: int, token: int, count: int, logprobs: Any) -> None:
        if self.broken:
            raise RuntimeError("a bug")
        self.tokens.append(token)

    def on_finished(self, *words: Any) -> None: ...

    def on_error(self, live: Live, error: ApiError) -> None:
        self.errors.append(error)
        if self.broken:
            raise RuntimeError("a third bug")

    def end_step(self, step: int) -> None:
        if self.broken:
            raise RuntimeError("another bug")
        self.steps += 1


@pytest.mark.parametrize("broken_first", [True, False])
async def test_a_sink_that_raises_ends_its_request_and_no_other(broken_first: bool) -> None:
    client = EngineClient(Configure(model_path="m"))
    sinks = [RecordingSink(broken=broken_first), RecordingSink(broken=not broken_first)]
    for number, sink in enumerate(sinks, start=1):
        client.submit(Live(AddRequest(number, [5]), "same id", sink))
    client._deal(StepOutput([1, 2], [0, 0], [7, 8], [1, 1], {}, [], [], [], Load()))
    broken, fine = sinks if broken_first else sinks[::-1]
    assert [error.reason for error in broken.errors] == ["internal_error"]
    assert (len(fine.tokens), fine.errors, fine.steps) == (1, [], 1)
    assert client.num_live == 1


async def test_a_sink_that_raises_does_not_keep_a_lost_core_from_the_others() -> None:
    client = EngineClient(Configure(model_path="m"))
    sinks = [RecordingSink(broken=True), RecordingSink()]
    for number, sink in enumerate(sinks, start=1):
        client.submit(Live(AddRequest(number, [5]), "same id", sink, started=True))
    client._state_changed(State.DOWN)
    assert [error.reason for sink in sinks for error in sink.errors] == ["engine_lost"] * 2
    assert client.num_live == 0
    assert sinks[1].steps == 1
