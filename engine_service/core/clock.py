"""The clock of every deadline and duration in the core; the server's process reads the same one."""

from __future__ import annotations

import time


def monotonic_us() -> int:
    return time.monotonic_ns() // 1000
