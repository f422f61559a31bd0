"""An idle engine: long turns between looks at its core, short ones as soon as there is work."""

from __future__ import annotations

import asyncio

import pytest

from penstock.engine_service import core_keeper
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.core_keeper import CoreKeeper


def keeper(idle: bool, silence_seconds: float = 120.0) -> CoreKeeper:
    return CoreKeeper(
        Configure("nowhere"),
        silence_seconds=silence_seconds,
        on_message=lambda message: None,
        on_state=lambda state: None,
        on_tick=lambda: None,
        is_idle=lambda: idle,
    )


async def test_work_ends_a_long_turn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_keeper, "IDLE_PING_INTERVAL_S", 3600.0)
    watched = keeper(idle=True, silence_seconds=1e6)
    turn = asyncio.create_task(watched._turn())
    await asyncio.sleep(0)
    assert not turn.done()
    watched.stir()
    assert await asyncio.wait_for(turn, 60) == 0.0  # no silence of the core's


@pytest.mark.parametrize(
    ("idle", "silence_seconds", "expected"), [(True, 0.04, 0.01), (True, 1e6, 0.02), (False, 1e6, 0.01)]
)
async def test_turns_count_as_the_silence_they_are(
    monkeypatch: pytest.MonkeyPatch, idle: bool, silence_seconds: float, expected: float
) -> None:
    monkeypatch.setattr(core_keeper, "IDLE_PING_INTERVAL_S", 0.02)
    monkeypatch.setattr(core_keeper, "PING_INTERVAL_S", 0.01)
    assert await keeper(idle, silence_seconds)._turn() == expected


async def test_work_that_came_before_an_idle_turn_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_keeper, "IDLE_PING_INTERVAL_S", 0.01)
    watched = keeper(idle=True)
    watched.stir()
    assert await watched._turn() == 0.01
