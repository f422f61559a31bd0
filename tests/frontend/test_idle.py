"""A frontend that nobody uses: its clocks stand still, and start again when somebody comes."""

from __future__ import annotations

import asyncio
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from penstock.frontend import connection, http_server
from penstock.frontend.connection import Connection
from penstock.frontend.context import Context
from penstock.frontend.targets import AddressBook

LIMIT_S = 60.0


class Stream:
    def __init__(self) -> None:
        self.ticked = asyncio.Event()

    def tick(self) -> None:
        self.ticked.set()


async def test_the_ticker_of_streams_sleeps_until_there_is_one() -> None:
    context = Context(services=None, metrics=None)  # type: ignore[arg-type]
    ticker = asyncio.create_task(context.keep_streams_alive(0.0))
    try:
        for _ in range(2):
            stream: Any = Stream()
            context.follow(stream)
            await asyncio.wait_for(stream.ticked.wait(), LIMIT_S)
            context.streams.discard(stream)
            for _ in range(5):
                await asyncio.sleep(0)
            assert not context.has_streams.is_set()
    finally:
        ticker.cancel()


@pytest.fixture
async def replica(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(connection, "_PROBE_INTERVAL_S", 0.0)
    monkeypatch.setattr(connection, "_IDLE_PROBE_INTERVAL_S", 3600.0)
    made = Connection("unix:/nowhere", "x", lambda: None)
    yield made
    await made.close()


async def test_an_unused_replica_is_probed_when_somebody_asks(replica: Connection) -> None:
    due = asyncio.create_task(replica._until_due())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not due.done()
    replica.touch()
    await asyncio.wait_for(due, LIMIT_S)


async def test_one_that_was_silent_is_probed_until_it_answers(replica: Connection) -> None:
    replica._responsive = False
    await asyncio.wait_for(replica._until_due(), LIMIT_S)


async def test_literal_targets_are_looked_up_once() -> None:
    added: list[str] = []
    book = AddressBook(["unix:/a", "ipv4:127.0.0.1:1"], added.append, print, 0.0)
    await asyncio.wait_for(book.run(), LIMIT_S)
    assert sorted(added) == ["ipv4:127.0.0.1:1", "unix:/a"]


def test_the_date_is_made_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_700_000_000.2]
    monkeypatch.setattr(http_server.time, "time", lambda: now[0])
    state = http_server._State()
    for seconds in (0, 0, 61):
        now[0] += seconds
        [(name, value)] = state.default_headers
        assert name == b"date"
        assert parsedate_to_datetime(value.decode()).timestamp() == int(now[0])
