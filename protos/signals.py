"""The signals that ask a process to end. Knows no service."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

# `timeout`, make and the like pass one signal on twice, to the process and to its group: that is one request.
SAME_SIGNAL_S = 0.5


def on_shutdown_signal(callback: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT calls back; one after more than SAME_SIGNAL_S exits at once with 1."""
    loop = asyncio.get_running_loop()
    first: float | None = None

    def handle() -> None:
        nonlocal first
        now = loop.time()
        if first is None:
            first = now
            callback()
        elif now - first > SAME_SIGNAL_S:
            os._exit(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle)
