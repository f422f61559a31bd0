"""The event loop of a service. Knows no gRPC, whose import takes a while."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# Container objects made between two looks for cycles. Requests make many and leave no cycles; Python's own
# 700 was a tenth of a frontend's CPU.
_GC_THRESHOLDS = (20_000, 20, 100)


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run for a service: on uvloop where it is installed, since gRPC's callbacks cost half as much
    there, and with a garbage collector that does not look at what was imported."""
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Waits for the event, at most so long. Whether it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
